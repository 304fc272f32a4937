"""The co-located profile: the host in the place of the three stages. The tests build on one another, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.deployment import STAGES, Deployment, deployed
from tests.e2e.turns import Spoken, load, speak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

HOST = "colocated"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """As docs/deployment.md starts it, without a GPU: no stage has a container of its own."""
    with deployed(dict.fromkeys(STAGES, 0), COMPOSE_PROFILES=HOST) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Spoken]:
    """The first test's turn: what every later one with the same seed has to repeat."""
    return {}


async def test_one_spoken_turn_goes_through_the_host(deployment: Deployment, undisturbed: dict[str, Spoken]) -> None:
    [host] = deployment.containers(HOST, running=True)
    assert not any(deployment.containers(stage) for stage in STAGES)
    turn = await speak(deployment)
    assert turn.pcm
    assert list(turn.workers()) == list(STAGES)
    assert all(host.id[:12] in worker for worker in turn.workers().values())
    undisturbed["turn"] = turn


def test_its_image_is_the_llms_and_the_code_of_all_stages(deployment: Deployment) -> None:
    host, llm = (deployment.engine.images.get(f"kimia-{name}:e2e") for name in (HOST, "llm"))
    shared = llm.attrs["RootFS"]["Layers"][:-1]  # all but the stage's own code
    assert host.attrs["RootFS"]["Layers"][: len(shared)] == shared
    assert host.attrs["Config"]["User"] == llm.attrs["Config"]["User"]


async def test_single_stages_take_over_from_a_host_that_is_killed_under_load(
    deployment: Deployment, undisturbed: dict[str, Spoken]
) -> None:
    """And they say the same, bit for bit."""
    await asyncio.to_thread(deployment.scale, colocated=1, **dict.fromkeys(STAGES, 1))
    [host] = deployment.containers(HOST, running=True)
    async with load(deployment) as state:
        await state.until(lambda: bool(state.turns))
        while not await asyncio.to_thread(deployment.held, "llm", host):
            assert not state.failures, state.failures
        host.kill("SIGKILL")
        ended = len(state.turns)
        await state.until(lambda: len(state.turns) > ended + 6)
    state.check(undisturbed["turn"])


async def test_a_rolling_restart_of_the_host_alone_fails_no_turn(
    deployment: Deployment, undisturbed: dict[str, Spoken]
) -> None:
    await asyncio.to_thread(deployment.scale, colocated=1, **dict.fromkeys(STAGES, 0))
    [before] = deployment.containers(HOST, running=True)
    async with load(deployment) as state:
        await state.until(lambda: bool(state.turns))
        await asyncio.to_thread(deployment.roll, HOST)
        [after] = deployment.containers(HOST, running=True)
        await state.until(lambda: state.served([after]))
    state.check(undisturbed["turn"])
    assert before.id != after.id


def test_quantised_weights_can_be_asked_for(deployment: Deployment) -> None:
    """What KIMIA_QUANTIZE needs is in the image."""
    assert deployment.execute(HOST, "python", "-c", "import torchao.quantization") == 0
