"""Dockerfiles, compose files and .env.example agree with each other and with the settings."""

import re
from pathlib import Path

import pytest
import yaml

from kimia.runtime.settings import Settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
STAGES = ("tokenizer", "llm", "detokenizer")
PROCESSES = (*STAGES, "colocated", "orchestrator")
OWN = "# ---- What this image adds ----"
EXAMPLE = (ROOT / "deploy/.env.example").read_text(encoding="utf-8")
COMPOSE = (ROOT / "deploy/compose.yaml").read_text(encoding="utf-8")
GPU = (ROOT / "deploy/compose.gpu.yaml").read_text(encoding="utf-8")
SERVICES = yaml.safe_load(COMPOSE)["services"]


def dockerfile(process: str) -> str:
    folder = ROOT if process == "orchestrator" else ROOT / "services"
    return (folder / process / "Dockerfile").read_text(encoding="utf-8")


def instructions(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_share_every_layer_but_their_own_code(stage: str) -> None:
    shared, own = dockerfile(stage).split(OWN)
    assert instructions(shared) == instructions(dockerfile("llm").split(OWN)[0])
    assert own.count("COPY") == 2
    others = [name for name in STAGES if name != stage]
    assert not any(f"services/{name}" in dockerfile(stage) for name in others)


def test_the_host_has_the_layers_of_the_stages_and_the_code_of_all() -> None:
    shared, own = dockerfile("colocated").split(OWN)
    assert instructions(shared) == instructions(dockerfile("llm").split(OWN)[0])
    for name in (*STAGES, "colocated"):
        assert f"COPY services/{name} services/{name}\n" in own


@pytest.mark.parametrize("process", PROCESSES)
def test_every_image_is_confined_probed_and_stopped_alike(process: str) -> None:
    text = dockerfile(process)
    for line in ("USER 10001:10001", "STOPSIGNAL SIGTERM", "ENV KIMIA_LISTEN=0.0.0.0:50051"):
        assert line.removeprefix("ENV ") in text
    assert '"kimia.runtime.health", "127.0.0.1:50051"]' in text
    assert "no-cache-dir" not in text  # the cache is a mount: it stays out of the layers and builds are fast
    assert re.search(r'^ENTRYPOINT \["python", "-m", "(services\.)?' + process, text, re.MULTILINE)


def test_settings_in_compose_are_settings_of_the_processes() -> None:
    known = {f"KIMIA_{name.upper()}" for name in Settings.model_fields}
    for process in PROCESSES:
        names = {name for name in SERVICES[process]["environment"] if name.startswith("KIMIA_")}
        assert names <= known


def test_every_setting_of_the_processes_can_be_made_or_is_the_images_own() -> None:
    own = {"LISTEN", "MODEL", "VQ_TOKENIZER", "READY_FILE"}
    made = {name for process in PROCESSES for name in SERVICES[process]["environment"]}
    assert {f"KIMIA_{name.upper()}" for name in Settings.model_fields} - made == {f"KIMIA_{name}" for name in own}


def test_every_variable_of_compose_stands_in_the_example_and_the_other_way_round() -> None:
    read = set(re.findall(r"\$\{(KIMIA_\w+)", COMPOSE + GPU))
    read |= {name for process in PROCESSES for name, value in SERVICES[process]["environment"].items() if value is None}
    assert set(re.findall(r"^# (KIMIA_\w+)=", EXAMPLE, re.MULTILINE)) == read


def test_defaults_in_the_example_are_the_defaults() -> None:
    shown = dict(re.findall(r"^# (KIMIA_\w+)=(.*)$", EXAMPLE, re.MULTILINE))
    of_settings = {f"KIMIA_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    of_compose = dict(re.findall(r"\$\{(KIMIA_\w+):-([^}]*)\}", GPU + COMPOSE))  # of both, the CPU's holds
    defaults = {name: as_written(value) for name, value in (of_settings | of_compose).items()}
    free = {"KIMIA_MODEL_DIR", "KIMIA_DTYPE"}  # by the kind of deployment
    free |= {name for name in shown if name.startswith("KIMIA_TLS_") and name.endswith("_FILE")}  # not there
    assert {k: v for k, v in shown.items() if k not in free} == {k: defaults[k] for k in shown if k not in free}


def as_written(value: object) -> str:
    """A default as a person writes it: `false`, `30`, not `False`, `30.0`."""
    return str(value).lower().removesuffix(".0")


def test_nothing_in_the_example_is_set() -> None:
    assert [line for line in EXAMPLE.splitlines() if line and not line.startswith("# ")] == []


def test_a_container_is_killed_only_after_it_had_time_to_drain() -> None:
    grace = re.search(r"KIMIA_STOP_GRACE:-(\d+)s", COMPOSE)
    drain = re.search(r"KIMIA_DRAIN_SECONDS:-(\d+)", COMPOSE)
    assert int(grace[1]) > int(drain[1])


def test_every_long_running_container_is_confined() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert "container_name" not in service, name  # a name of its own forbids --scale


def test_triton_has_the_threads_of_a_stage() -> None:
    """With others its sums are in another order, and what it computes on a CPU is not bit-equal."""
    stage = SERVICES["tokenizer"]["environment"]
    assert SERVICES["triton"]["environment"]["OMP_NUM_THREADS"] == stage["OMP_NUM_THREADS"] == stage["KIMIA_THREADS"]


def test_a_profile_with_the_language_model_can_quantise_it() -> None:
    for process in ("llm", "colocated"):
        assert "KIMIA_QUANTIZE" in SERVICES[process]["environment"]
        assert "dependencies.py quantize" in dockerfile(process).split(OWN)[1]


def test_only_the_orchestrator_publishes_a_port() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["orchestrator"]
    assert yaml.safe_load(COMPOSE)["networks"]["inside"] == {"internal": True}
    assert [name for name, service in SERVICES.items() if "edge" in service.get("networks", [])] == ["orchestrator"]
