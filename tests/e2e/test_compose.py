"""The default deployment, from `up` to `down`. The tests build on one another, in their order."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path

import pytest
from docker.models.containers import Container

from kimia.client import AsyncKimia
from kimia.errors import UnavailableError
from tests.e2e.deployment import STAGES, Deployment
from tests.e2e.turns import Load, Spoken, load, speak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

SERVICES = (*STAGES, "orchestrator")
SAMPLE_BYTES = 2
OWN_LAYERS = {"tokenizer": 2, "llm": 3, "detokenizer": 2}  # the package and the stage; of the llm also torchao
CREATE = """
import os, sys
try:
    os.open(sys.argv[1], os.O_CREAT)
except OSError as error:
    sys.exit(error.errno)
"""
TWO_OF_EACH = dict.fromkeys(SERVICES, 2)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Spoken]:
    """The first test's turn: what every later one with the same seed has to repeat."""
    return {}


async def test_one_spoken_turn(deployment: Deployment, undisturbed: dict[str, Spoken]) -> None:
    turn = await speak(deployment)
    assert turn.pcm
    assert len(turn.pcm) % SAMPLE_BYTES == 0
    assert list(turn.workers()) == list(STAGES)
    assert all(turn.workers().values())
    undisturbed["turn"] = turn


def test_the_images(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    images = {name: deployment.engine.images.get(f"kimia-{name}:e2e") for name in SERVICES}
    layers = {name: image.attrs["RootFS"]["Layers"] for name, image in images.items()}
    for name, image in images.items():
        with capsys.disabled():
            print(f"\nkimia-{name}: {image.attrs['Size'] / 1e6:.0f} MB, {len(layers[name])} layers", end="")
    shared = layers["tokenizer"][:-2]  # all but the stage's own code
    assert all(layers[name][: len(shared)] == shared for name in STAGES)
    assert {name: len(layers[name]) - len(shared) for name in STAGES} == OWN_LAYERS
    assert images["orchestrator"].attrs["Size"] < images["llm"].attrs["Size"] / 2
    for image in images.values():
        assert image.attrs["Config"]["User"] == "10001:10001"
        assert image.attrs["Config"]["StopSignal"] == "SIGTERM"
        assert image.attrs["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_control_plane_has_no_torch(deployment: Deployment) -> None:
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    assert deployment.execute("orchestrator", "python", "-c", found) == 0
    assert deployment.execute("llm", "python", "-c", found) == 1


def test_containers_can_do_little(deployment: Deployment) -> None:
    for container in deployment.containers():
        name, host = container.name, container.attrs["HostConfig"]
        user = container.attrs["Config"]["User"]
        assert user.partition(":")[0].isdecimal(), name
        assert user.partition(":")[0] != "0", name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert host["SecurityOpt"] == ["no-new-privileges:true"], name
        assert not host["Privileged"], name
        assert not any("docker.sock" in mount["Source"] for mount in container.attrs["Mounts"]), name


def test_the_root_file_system_cannot_be_written(deployment: Deployment) -> None:
    for service in SERVICES:
        assert deployment.execute(service, "python", "-c", CREATE, "/app/x", user="0") == errno.EROFS, service
        assert deployment.execute(service, "python", "-c", CREATE, "/tmp/x") == 0, service


def test_only_the_orchestrator_is_reached_from_outside(deployment: Deployment) -> None:
    published = {c.labels["com.docker.compose.service"] for c in deployment.containers() if any(c.ports.values())}
    assert published == {"orchestrator"}
    [network] = deployment.engine.networks.list(names=[f"{deployment.project}_inside"])
    assert network.attrs["Internal"]


def test_settings_arrive(deployment: Deployment) -> None:
    """A name without a value in compose.yaml is passed on; unset it is absent, not empty."""
    for service in SERVICES:
        [container] = deployment.containers(service)
        lines = container.attrs["Config"]["Env"]  # a name alone: not set
        settings = dict(line.split("=", 1) for line in lines if "=" in line)
        assert settings["KIMIA_LOG_FORMAT"] == "text"
        assert "KIMIA_LEASE_SECONDS" not in settings


def test_the_files_for_gpus_fit_together(deployment: Deployment) -> None:
    gpu = ("--file", "deploy/compose.yaml", "--file", "deploy/compose.gpu.yaml")
    merged = json.loads(deployment.compose(*gpu, "config", "--format", "json"))["services"]
    for stage in STAGES:
        assert merged[stage]["image"] == f"kimia-{stage}:e2e-cuda"
        assert merged[stage]["environment"]["KIMIA_DEVICE"] == "cuda"
        [device] = merged[stage]["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == ["0"]
    assert merged["model"]["image"] == merged["tokenizer"]["image"]
    assert "deploy" not in merged["orchestrator"]


async def test_both_replicas_of_every_stage_serve(deployment: Deployment, undisturbed: dict[str, Spoken]) -> None:
    await asyncio.to_thread(deployment.scale, **TWO_OF_EACH)
    replicas = [container for stage in STAGES for container in deployment.containers(stage, running=True)]
    assert len(replicas) == 2 * len(STAGES)
    async with load(deployment) as state:
        await state.until(lambda: state.served(replicas))
    state.check(undisturbed["turn"])


@pytest.mark.parametrize("service", SERVICES)
async def test_a_rolling_restart_under_load_fails_no_turn(
    deployment: Deployment, undisturbed: dict[str, Spoken], service: str
) -> None:
    await asyncio.to_thread(deployment.scale, **TWO_OF_EACH)
    before = deployment.containers(service, running=True)
    async with load(deployment) as state:
        if service in STAGES:
            await state.until(lambda: state.served(before))
        await asyncio.to_thread(deployment.roll, service)
        after, ended = deployment.containers(service, running=True), len(state.turns)
        await state.until(lambda: state.served(after) if service in STAGES else len(state.turns) > ended + 3)
    state.check(undisturbed["turn"])
    assert len(before) == len(after) == 2
    assert not {container.id for container in before} & {container.id for container in after}


@pytest.mark.parametrize("service", [*SERVICES, "redis"])
async def test_a_container_killed_under_load_fails_no_turn(
    deployment: Deployment, undisturbed: dict[str, Spoken], service: str
) -> None:
    """Of a stage the one that holds a turn; Redis, of which there is one, comes back with its AOF."""
    await asyncio.to_thread(deployment.scale, **TWO_OF_EACH)
    victim, *_ = deployment.containers(service, running=True)
    async with load(deployment) as state:
        await state.until(lambda: bool(state.turns))
        while service in STAGES and not await asyncio.to_thread(deployment.held, service, victim):
            assert not state.failures, state.failures
        victim.kill("SIGKILL")
        ended = len(state.turns)
        if service == "redis":
            victim.start()
        await state.until(lambda: len(state.turns) > ended + 6)
    state.check(undisturbed["turn"])


@pytest.mark.parametrize("stage", ["llm", "detokenizer"])
async def test_a_worker_that_was_cut_off_writes_nothing_more(
    deployment: Deployment, undisturbed: dict[str, Spoken], stage: str
) -> None:
    """Its network goes while it holds a turn, and comes back when another worker has ended that turn."""
    await asyncio.to_thread(deployment.scale, **TWO_OF_EACH)
    victim, *_ = deployment.containers(stage, running=True)
    async with load(deployment) as state:
        held = await cut_off_in_a_turn(deployment, state, stage, victim)
        await state.served_again(victim)
    state.check(undisturbed["turn"])
    taken_over = [turn for turn in state.turns if turn.turn_id in held]
    assert {turn.turn_id for turn in taken_over} == held
    assert not any(victim.id[:12] in turn.workers()[stage] for turn in taken_over)
    said = victim.logs().decode().splitlines()
    assert all(any("turn left" in line and turn in line for line in said) for turn in held)


async def cut_off_in_a_turn(deployment: Deployment, state: Load, stage: str, victim: Container) -> set[str]:
    """Take a container's network away while it holds turns, until others have ended these; their ids."""
    for _ in range(20):
        with deployment.cut_off(stage, victim):
            held = await asyncio.to_thread(deployment.held, stage, victim)
            if held:
                await state.ended(held)
                return held
        await state.served_again(victim)
    raise AssertionError("it held no turn whenever its network went")


async def test_tls_at_the_door(deployment: Deployment, undisturbed: dict[str, Spoken], tmp_path: Path) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issue = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost -addext"
    deployment.command(
        "openssl", *issue.split(), "subjectAltName=DNS:localhost", "-keyout", f"{key}", "-out", f"{chain}"
    )
    key.chmod(0o644)  # the container's user reads it
    secured = deployment.with_settings(KIMIA_TLS_CERTIFICATE_FILE=str(chain), KIMIA_TLS_KEY_FILE=str(key))
    await asyncio.to_thread(secured.compose, "up", "--detach", "--wait", "--no-build", "--no-deps", "orchestrator")
    assert (await speak(secured, chain.read_bytes())).pcm == undisturbed["turn"].pcm
    async with AsyncKimia(secured.target()) as plain:
        with pytest.raises(UnavailableError):
            await plain.connect(timeout=2)


def test_down_leaves_the_volumes_and_with_volumes_nothing(deployment: Deployment) -> None:
    deployment.compose("down")
    assert sorted(deployment.leftovers()) == [f"{deployment.project}_journal", f"{deployment.project}_model"]
    deployment.compose("down", "--volumes")
    assert deployment.leftovers() == []
