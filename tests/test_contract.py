"""The contract: well written, compatible with what was released, and the generated code belongs to it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto"
FILES = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
TOOLS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}  # protoc looks for its plugins there


def buf(*arguments):
    """(exit code, what it says)."""
    command = [TOOLS / "buf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def contract(tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(PROTO, tmp_path / "proto"))


def replaced(contract, name, old, new):
    path = contract / "kimia" / "v1" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_it_is_well_written():
    assert buf("lint", PROTO) == (0, "")


def test_what_is_badly_written_is_noticed(contract):
    replaced(contract, "audio.proto", "uint32 sample_rate = 2;", "uint32 SampleRate = 2;")
    assert buf("lint", contract)[0] != 0


def test_it_is_compatible_with_what_was_released():
    assert buf("breaking", PROTO, "--against", PROTO / "released.binpb") == (0, "")


def test_what_breaks_clients_is_noticed(contract):
    replaced(contract, "audio.proto", "uint32 sample_rate = 2;", "uint64 sample_rate = 2;")
    code, said = buf("breaking", contract, "--against", PROTO / "released.binpb")
    assert code != 0
    assert "sample_rate" in said


def generate(folder, files, *outputs):
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    command += [f"--{option}{folder}" for option in outputs]
    subprocess.run([*command, *files], env=ENVIRONMENT, check=True)


def test_the_generated_code_is_current(tmp_path):
    """As `make proto` makes it."""
    services = [name for name in FILES if "\nservice " in (PROTO / name).read_text(encoding="utf-8")]
    generate(tmp_path, FILES, "python_out=", "mypy_out=quiet:")
    generate(tmp_path, services, "grpc_python_out=", "mypy_grpc_out=quiet:")
    made = {path.name: path.read_bytes() for path in (tmp_path / "kimia" / "v1").iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / "kimia" / "v1").glob("*_pb2*")}
    assert sorted(made) == sorted(kept)
    assert [name for name in made if made[name] != kept[name]] == []
