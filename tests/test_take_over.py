"""Any process is killed in mid-sentence, and the caller gets exactly what he would have got."""

import os
import signal

import pytest
import redis

from kimia.client import Answer, Kimia, TextDelta
from kimia.streams import keys
from tests.golden_data import COMMITTED
from tests.running import Service, running

pytestmark = [pytest.mark.unit, pytest.mark.timeout(240)]

CLIP = COMMITTED / "e2e" / "audio" / "clip_b2.wav"
SPOKEN = [{"role": "user", "message_type": "audio", "content": str(CLIP)}]
OPTIONS = {"seed": 9, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def service():
    timing = pytest.MonkeyPatch()
    timing.setenv("KIMIA_LEASE_SECONDS", "0.5")
    timing.setenv("KIMIA_FAKE_CLIP_SECONDS", "1")  # long enough to be killed in the middle
    timing.setenv("KIMIA_FAKE_STEP_SECONDS", "0.03")
    with running("--fake", "--replicas", "tokenizer=2", "llm=2", "detokenizer=2") as service:
        timing.undo()
        yield service


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> Answer:
    with Kimia(service.address) as kimia:
        return kimia.generate(SPOKEN, **OPTIONS).collect()


def kill(service: Service, turn_id: str, stage: str) -> None:
    """The worker that has the turn, with no time to say goodbye; its name tells its process."""
    with redis.Redis.from_url(service.redis_url, decode_responses=True) as store:
        worker = None
        while worker is None:
            worker = store.hget(keys.head("{0}", turn_id), f"{stage}:consumer")
    os.kill(int(worker.split("-")[-2]), signal.SIGKILL)


@pytest.mark.parametrize("stage", ["tokenizer", "llm", "detokenizer"])
def test_a_worker_is_killed(service: Service, undisturbed: Answer, stage: str) -> None:
    with Kimia(service.address) as kimia:
        turn = kimia.generate(SPOKEN, **OPTIONS)
        texts = 0
        for event in turn:
            texts += isinstance(event, TextDelta)
            if texts == 20 or stage == "tokenizer":
                kill(service, turn.turn_id, stage)
                break
        answer = turn.collect()
    assert (answer.text, answer.pcm) == (undisturbed.text, undisturbed.pcm)
    assert {found.stage: found.take_overs for found in answer.latency.stages}[stage] == 1


def test_the_orchestrator_is_killed(service: Service, undisturbed: Answer) -> None:
    with Kimia(service.address) as kimia:
        turn = kimia.generate(SPOKEN, **OPTIONS)
        killed = False
        for event in turn:
            if isinstance(event, TextDelta) and event.index == 20 and not killed:
                killed = True
                with redis.Redis.from_url(service.redis_url, decode_responses=True) as store:
                    reader = store.hget(keys.head("{0}", turn.turn_id), "reader")
                os.kill(int(reader.split("-")[-2]), signal.SIGKILL)
        answer = turn.progress.answer()
    assert killed
    assert (answer.text, answer.pcm) == (undisturbed.text, undisturbed.pcm)
