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
PIECE = 3200  # bytes: 100 ms


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


SAID = bytes(at * 7 % 251 for at in range(20 * PIECE))  # 2 s


def kill_reader(service: Service, session_id: str) -> None:
    """The orchestrator that takes a caller's sound, as soon as some of it is stored."""
    with redis.Redis.from_url(service.redis_url) as store:
        reader = None
        while reader is None:
            for key in store.scan_iter(f"{{0}}:turn:{session_id}.*:input"):
                reader = store.hget(key.removesuffix(b":input"), "reader")
    os.kill(int(reader.split(b"-")[-2]), signal.SIGKILL)


def called(service: Service, disturb: bool) -> tuple[str, bytes, int]:
    """The answer to a call of one question, and how many pieces of sound its session has."""
    with Kimia(service.address) as kimia, kimia.converse(**OPTIONS) as call:
        call.send_audio(SAID[: 10 * PIECE])
        if disturb:
            kill_reader(service, call.session_id)
        call.send_audio(SAID[10 * PIECE :])
        call.commit()
        answer = call.answer()
        return answer.text, answer.pcm, kimia.session(call.session_id).next_audio_index


def test_the_orchestrator_is_killed_while_the_caller_speaks(service: Service) -> None:
    """Half of the sound is on its way or stored when it dies; the rest is said to nobody, and sent to the next one."""
    undisturbed = called(service, disturb=False)
    assert undisturbed[2] == 20
    assert called(service, disturb=True) == undisturbed
