import pytest

from kimia.stage import DETOKENIZER, LLM
from kimia.streams.journal import Head, StageTimes
from kimia.v1.turn_pb2 import Chunk, Failure, StageReport, Step, Turn
from orchestrator.following import Following
from orchestrator.outcome import cancelled_event, count, last_event, latency

pytestmark = pytest.mark.unit

TURN = Turn(id="s.1", route=[LLM.number, DETOKENIZER.number])
TIMES = {
    "llm": StageTimes(1_000_100, 1_000_200, 1_000_300, 1_000_900, "llm-1", 1),
    "detokenizer": StageTimes(1_000_300, 1_000_400, 1_000_600, 1_001_000, "detokenizer-1", 0),
}


def head(state="done", stages=TIMES, failure=None):
    return Head(TURN, state, failure, 900_000, 1_000_000, 1_001_100, stages, {}, "me", 7, 0)


def following():
    found = Following(None, TURN)
    found.tokens = [Chunk(step=Step(text="a", code=1)), Chunk(step=Step(text="b"), final=True)]
    found.reports["llm"] = StageReport(worker="llm-2", compute_seconds=0.25, prompt_positions=7, dropped_messages=2)
    found.sound.samples = 1920
    return found


def test_an_answer_says_what_it_took():
    done = last_event(following(), head(), 0).done
    assert done.text == "ab"
    assert (done.usage.prompt_positions, done.usage.steps, done.usage.audio_codes) == (7, 2, 1)
    assert (done.usage.audio_samples, done.usage.dropped_messages) == (1920, 2)


def test_times_are_counted_from_the_turns_start():
    found = latency(head(), following().reports)
    assert found.first_text.ToMicroseconds() == 300
    assert found.first_audio.ToMicroseconds() == 600
    assert found.total.ToMicroseconds() == 1100
    assert [stage.stage for stage in found.stages] == [2, 3]
    first = found.stages[0]
    assert [getattr(first, name).ToMicroseconds() for name in ("queued", "claimed", "first", "done")] == [
        100,
        200,
        300,
        900,
    ]
    assert first.compute.ToMilliseconds() == 250
    assert (first.worker, first.take_overs) == ("llm-2", 1)
    assert found.stages[1].worker == "detokenizer-1"


def test_what_has_not_happened_has_no_time():
    found = latency(head(stages={"llm": StageTimes(1_000_100, 0, 0, 0, "", 0)}), {})
    assert not found.HasField("first_text")
    assert not found.HasField("first_audio")
    assert not found.stages[0].HasField("claimed")
    assert len(found.stages) == 1


def test_other_ends():
    assert last_event(following(), head("cancelled"), 4) == cancelled_event("s.1", 4)
    failure = Failure(code=3, reason="CONTEXT_LENGTH", message="too long")
    assert last_event(following(), head("error", failure=failure), 0).failed == failure


def test_turns_are_counted():
    from prometheus_client import REGISTRY

    def value(name, **labels):
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before = value("kimia_turns_total", stage="orchestrator", outcome="done"), value("kimia_first_text_seconds_count")
    count(following(), head())
    after = value("kimia_turns_total", stage="orchestrator", outcome="done"), value("kimia_first_text_seconds_count")
    assert after == (before[0] + 1, before[1] + 1)
