"""The rules of the house that a linter does not know."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / name for name in ("kimia", "services", "orchestrator", "gateway", "training") if (ROOT / name).is_dir()]
GENERATED = ROOT / "kimia" / "v1"
MODULES = sorted(
    path
    for room in ROOMS
    for path in room.rglob("*.py")
    if not path.name.startswith("__") and GENERATED not in path.parents
)
LONGEST_FUNCTION = 80  # lines
LONGEST_MODULE = 500

# What must do without torch, so that a client or the control plane is small and starts at once.
LIGHT = [
    ROOT / name for name in ("kimia/client", "kimia/streams", "kimia/runtime", "kimia/v1", "orchestrator", "gateway")
]
LIGHT_MODULES = ["kimia.cli", "kimia.cli.arguments", "kimia.errors", "kimia.stage", "kimia.status"]


def name(module: Path) -> str:
    return str(module.relative_to(ROOT))


def mirror_of(module: Path) -> Path:
    """Its test file: tests/streams/test_jobs.py of kimia/streams/jobs.py, tests/services/x of services/x."""
    relative = module.relative_to(ROOT / "kimia" if module.is_relative_to(ROOT / "kimia") else ROOT)
    return ROOT / "tests" / relative.parent / f"test_{relative.name}"


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_every_module_has_its_test_file(module: Path) -> None:
    assert mirror_of(module).exists()


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_modules_and_functions_stay_short(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_MODULE
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION] == []


def test_the_rooms_are_seen() -> None:
    """Moving a room away must not silence its rules."""
    rooms = {module.relative_to(ROOT).parts[0] for module in MODULES}
    assert rooms >= {"kimia", "services", "orchestrator"}


def light_modules() -> list[str]:
    """Importable names of everything that must do without torch."""
    files = [path for room in LIGHT if room.is_dir() for path in room.rglob("*.py") if path.name != "__main__.py"]
    found = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return sorted({*found, *LIGHT_MODULES})


IMPORTER = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    heavy = {"torch", "transformers"} & set(sys.modules)
    if heavy:
        sys.exit(f"{module} imports {heavy}")
"""


def test_clients_and_the_control_plane_do_without_torch() -> None:
    modules = light_modules()
    assert {"kimia.cli", "kimia.runtime.service", "kimia.client", "kimia.streams.wire", "orchestrator"} <= set(modules)
    command = [sys.executable, "-c", IMPORTER, *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_library_starts_without_importing_anything() -> None:
    code = "import sys; before = set(sys.modules); import kimia; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "['kimia']\n"


def test_a_client_needs_neither_redis_nor_the_servers_packages() -> None:
    """`pip install kimia` brings grpc and protobuf only."""
    absent = ("redis", "structlog", "pydantic", "prometheus_client", "uvloop", "soxr", "numpy", "torch")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import kimia.client, kimia.status, kimia.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
