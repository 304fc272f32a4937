"""The default deployment, from `up` to `down`. The tests build on one another, in their order."""

from __future__ import annotations

import asyncio
import errno
import json

import pytest

from tests.e2e.deployment import STAGES, Deployment
from tests.e2e.turns import Spoken, load, speak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

SERVICES = (*STAGES, "orchestrator")
SAMPLE_BYTES = 2
CREATE = """
import os, sys
try:
    os.open(sys.argv[1], os.O_CREAT)
except OSError as error:
    sys.exit(error.errno)
"""
REPLICA_ROUNDS = 40  # turns after which a replica that never served is a failure


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


def test_the_images(deployment: Deployment, capsys: pytest.CaptureFixture[str], record_property) -> None:
    images = {name: deployment.engine.images.get(f"kimia-{name}:e2e") for name in SERVICES}
    layers = {name: image.attrs["RootFS"]["Layers"] for name, image in images.items()}
    for name, image in images.items():
        record_property(f"image_bytes_{name}", image.attrs["Size"])
        with capsys.disabled():
            print(f"\nkimia-{name}: {image.attrs['Size'] / 1e6:.0f} MB, {len(layers[name])} layers", end="")
    shared = layers["tokenizer"][:-2]  # all but the stage's own code
    assert all(layers[name][:-2] == shared for name in STAGES)
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
    await asyncio.to_thread(deployment.scale, **dict.fromkeys(STAGES, 2))
    async with load(deployment) as state:
        while not state.failures and len(state.turns) < REPLICA_ROUNDS:
            if all(len(state.workers()[stage]) == 2 for stage in STAGES):
                break
            await asyncio.sleep(0.1)
    assert state.failures == []
    assert {stage: len(workers) for stage, workers in state.workers().items()} == dict.fromkeys(STAGES, 2)
    assert {turn.text for turn in state.turns} == {undisturbed["turn"].text}
    assert {turn.pcm for turn in state.turns} == {undisturbed["turn"].pcm}


@pytest.mark.parametrize("service", SERVICES)
async def test_a_rolling_restart_under_load_fails_no_turn(
    deployment: Deployment, undisturbed: dict[str, Spoken], service: str
) -> None:
    if service == "orchestrator":
        await asyncio.to_thread(deployment.scale, orchestrator=2, **dict.fromkeys(STAGES, 2))
    before = {container.id for container in deployment.containers(service, running=True)}
    async with load(deployment) as state:
        await asyncio.to_thread(deployment.roll, service)
        ended = len(state.turns)
        while not state.failures and len(state.turns) < ended + 3:  # the new containers serve
            await asyncio.sleep(0.1)
    after = {container.id for container in deployment.containers(service, running=True)}
    assert state.failures == []
    assert len(before) == len(after) == 2
    assert not before & after
    assert {turn.text for turn in state.turns} == {undisturbed["turn"].text}
    assert {turn.pcm for turn in state.turns} == {undisturbed["turn"].pcm}


def test_down_leaves_the_volumes_and_with_volumes_nothing(deployment: Deployment) -> None:
    deployment.compose("down")
    assert sorted(deployment.leftovers()) == [f"{deployment.project}_journal", f"{deployment.project}_model"]
    deployment.compose("down", "--volumes")
    assert deployment.leftovers() == []
