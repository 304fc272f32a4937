"""The dry run of the GPU benchmark: every part runs, in slices, and `kimia plan` reads what comes of it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu
from kimia.errors import ParameterError
from kimia.model.capacity import Measured

pytestmark = pytest.mark.unit


def test_slices_until_all_is_there(tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "gpu.json"
    command = ["--preset", "tiny", "--device", "cpu", "--out", str(out)]
    assert gpu.main([*command, "--seconds", "-1"]) == gpu.MORE
    assert not out.exists()
    assert gpu.main([*command, "--seconds", "1000"]) == 0
    found = json.loads(out.read_text())
    assert found["device"] == "CPU: a dry run"
    assert found["decode"].keys() == {"1", "2"}
    assert found["decode"]["1"].keys() >= {"ms", "floor_ms", "floors", "aim", "reached", "within_80_ms"}
    assert found["decode_int8"]["2"].keys() >= {"ms", "floor_ms", "weight_gigabytes"}
    assert found["decode_fp8"]["1"]["ms"] > 0
    assert found["pipeline"]["1"]["speech_seconds"] > 0
    assert found["pipeline"]["1"]["ttfa_p50_ms"] > 0
    assert found["streams"]["1"].keys() == found["pipeline"]["1"].keys()
    assert 0 < found["streams"]["1"]["step_p50_ms"] <= found["streams"]["1"]["step_p99_ms"]
    assert found["load"]["gigabytes"] > 0
    assert Measured.read(out).decode(2, 0) == found["decode"]["2"]["ms"] / 1e3
    capsys.readouterr()
    del found["prefill"]
    out.write_text(json.dumps(found))
    assert gpu.main([*command, "--seconds", "1000"]) == 0
    [line] = capsys.readouterr().out.splitlines()  # nothing else is measured again
    assert line.startswith("prefill ")


def test_results_of_different_devices_are_never_mixed(tmp_path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"device": "another"}))
    with pytest.raises(SystemExit, match="measured elsewhere"):
        gpu.main(["--preset", "tiny", "--device", "cpu", "--out", str(out)])


def test_the_released_sizes_need_a_gpu(tmp_path) -> None:
    with pytest.raises(SystemExit, match="--preset tiny"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])


@pytest.mark.parametrize(
    ("named", "found"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_the_table_is_found_by_the_drivers_name(named, found, monkeypatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda _: named)
    assert gpu.guessed(gpu.torch.device("cuda")).name == found


def test_a_gpu_that_nobody_knows(monkeypatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda _: "NVIDIA Something")
    with pytest.raises(ParameterError, match="not in the table"):
        gpu.guessed(gpu.torch.device("cuda"))


def test_the_script_is_the_command(tmp_path) -> None:
    script = Path(gpu.__file__).with_suffix(".sh")
    environment = os.environ | {"PYTHON": "echo", "PRESET": "tiny"}
    done = subprocess.run([script, "x.json"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-m", "benchmarks.gpu", "--out", "x.json", "--preset", "tiny", "--seconds", "480"]
