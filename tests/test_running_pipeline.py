"""The running service against the plain pipeline: the same ids, text, chunks and samples for the same seed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
import soundfile

from kimia.client import AudioChunk, Kimia, TextDelta, TurnDone, TurnStarted
from kimia.pipeline import AudioChunk as PlainAudio
from kimia.pipeline import KimiAudio
from kimia.pipeline import TextDelta as PlainText
from kimia.pipeline import TurnDone as PlainDone
from kimia.sound import to_s16
from kimia.streams import keys
from tests.golden_data import COMMITTED
from tests.running import Service, running

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]

MODEL = COMMITTED / "e2e" / "model"
AUDIO = COMMITTED / "e2e" / "audio"
SPOKEN = {"role": "user", "message_type": "audio", "content": str(AUDIO / "clip_b2.wav")}
CALLED = {"role": "user", "message_type": "audio", "content": str(AUDIO / "call_8k.wav")}
WRITTEN = {"role": "user", "message_type": "text", "content": "How are you? 你好"}
PRESETS = ["low-latency", "upstream"]
SAMPLED = {
    "text_temperature": 0.7,
    "text_top_k": 8,
    "audio_temperature": 0.8,
    "audio_top_k": 10,
    "audio_repetition_penalty": 1.1,
    "audio_repetition_window_size": 20,
}
CASES = {
    "speech recognition": ([{"role": "user", "message_type": "text", "content": "Please transcribe:"}, SPOKEN], "text"),
    "text question, text": ([WRITTEN], "text"),
    "text question, both": ([WRITTEN], "both"),
    "audio question, text": ([SPOKEN], "text"),
    "audio question, both": ([SPOKEN], "both"),
    "text and two clips": ([WRITTEN, SPOKEN, CALLED], "both"),
}


@pytest.fixture(scope="module")
def service():
    with running("--model", str(MODEL), "--device", "cpu") as service:
        yield service


@pytest.fixture(scope="module")
def kimia(service: Service):
    with Kimia(service.address) as client:
        yield client


@pytest.fixture(scope="module")
def model():
    return KimiAudio(MODEL, device="cpu")


def served(turn) -> tuple:
    """Text deltas, samples of each chunk, reason of the stop, steps, positions; and the last event."""
    events = list(turn)
    assert isinstance(events[0], TurnStarted)
    done = events[-1]
    assert isinstance(done, TurnDone)
    text = [event.text for event in events if isinstance(event, TextDelta)]
    audio = [event.data for event in events if isinstance(event, AudioChunk) and event.data]
    return (text, audio, done.text, done.stop, done.usage.steps, done.usage.prompt_positions), done


def plain(events) -> tuple:
    """The same of the plain pipeline."""
    run = list(events)
    done = run[-1]
    assert isinstance(done, PlainDone)
    text = [event.text for event in run if isinstance(event, PlainText)]
    audio = [to_s16(event.pcm).tobytes() for event in run if isinstance(event, PlainAudio)]
    return (text, audio, done.text, done.stop, done.steps, done.prompt_positions), done


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", CASES)
def test_what_comes_out_is_what_the_plain_pipeline_gives(
    kimia: Kimia, model: KimiAudio, case: str, preset: str
) -> None:
    chats, output_type = CASES[case]
    options = {"preset": preset, "max_new_tokens": 55, "seed": 11, **SAMPLED}
    expected, _ = plain(model.stream(chats, output_type, **options))
    got, _ = served(kimia.generate(chats, output_type, **options))
    assert got == expected
    assert bool(got[1]) == (output_type == "both")


@pytest.mark.parametrize("preset", PRESETS)
def test_saying_a_text(kimia: Kimia, model: KimiAudio, preset: str) -> None:
    options = {"preset": preset, "max_new_tokens": 50, "seed": 3, **SAMPLED}
    expected = to_s16(model.say("Your order is on its way.", **options)[0].numpy()).tobytes()
    answer = kimia.say("Your order is on its way.", **options).collect()
    assert answer.text == "Your order is on its way."
    assert len(expected) > 0
    assert answer.pcm == expected


def cut(path: Path, samples: int) -> bytes:
    """A file of the first samples: a sound that no other test has, since features are shared by content."""
    wave, rate = soundfile.read(AUDIO / "clip_b2.wav", dtype="int16")
    soundfile.write(path, wave[:samples], rate)
    return path.read_bytes()


@pytest.mark.parametrize(("preset", "samples"), [("low-latency", 20_000), ("upstream", 21_000)])
def test_a_second_turn_remembers_the_first_by_its_ids(
    kimia: Kimia, model: KimiAudio, preset: str, samples: int, tmp_path: Path
) -> None:
    options = {"preset": preset, "max_new_tokens": 40, "seed": 5, **SAMPLED}
    ask = {"role": "user", "message_type": "audio", "content": cut(tmp_path / "cut.wav", samples)}
    first, done = plain(model.stream([ask], **options))
    again = {"role": "user", "message_type": "text", "content": "And then?"}
    second, _ = plain(model.stream([ask, done.message(), again], **options))
    session = f"memory-{preset}"
    assert served(kimia.generate([ask], session=session, **options))[0] == first
    got, last = served(kimia.generate([again], session=session, **options))
    assert got == second
    assert "tokenizer" not in [stage.stage for stage in last.latency.stages]  # nothing was encoded again
    remembered = kimia.session(session)
    assert len(remembered.turn_ids) == 2
    kimia.delete_session(session)


def test_turns_in_company_are_what_they_are_alone(kimia: Kimia, model: KimiAudio) -> None:
    options = {"max_new_tokens": 40, **SAMPLED}
    expected = [plain(model.stream([SPOKEN], seed=seed, **options))[0] for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        got = pool.map(lambda seed: served(kimia.generate([SPOKEN], seed=seed, **options))[0], range(3))
        assert list(got) == expected


def test_audio_leaves_before_the_last_token_comes(kimia: Kimia, service: Service) -> None:
    """By the order in which the logs were written: the reader's inbox has a pointer for each entry."""
    events = list(kimia.generate([SPOKEN], max_new_tokens=250, seed=11, **SAMPLED))
    turn = events[0].turn_id.encode()
    with redis.Redis.from_url(service.redis_url) as store:
        (inbox,) = [key for key in store.scan_iter("{0}:inbox:*") if b"orchestrator" in key]
        pointers = [fields for _, fields in store.xrange(inbox) if fields[b"t"] == turn]
    logs = [fields[b"l"] for fields in pointers if fields[b"l"] in (b"tokens", b"audio")]
    assert logs.count(b"tokens") == events[-1].usage.steps
    assert logs.index(b"audio") < len(logs) - 1 - logs[::-1].index(b"tokens")


def test_nothing_is_left_of_a_deleted_session(kimia: Kimia, service: Service) -> None:
    served(kimia.generate([SPOKEN], session="to-be-deleted", max_new_tokens=20, seed=1))
    with redis.Redis.from_url(service.redis_url) as store:
        assert list(store.scan_iter("*to-be-deleted*"))
        kimia.delete_session("to-be-deleted")
        left = {key.decode() for key in store.scan_iter("*to-be-deleted*")}
        assert left <= {keys.gone("{0}", "to-be-deleted")}


def test_every_key_expires_but_jobs_counters_and_the_ledger(kimia: Kimia, service: Service) -> None:
    served(kimia.generate([SPOKEN], session="kept", max_new_tokens=20, seed=1))
    with redis.Redis.from_url(service.redis_url) as store:
        permanent = {key.decode() for key in store.scan_iter("*") if store.ttl(key) == -1}
    assert {key for key in permanent if not key.startswith(("{0}:jobs:", "{0}:token:", "{ledger}:"))} == set()
    kimia.delete_session("kept")
