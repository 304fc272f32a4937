"""Events and answers from the wire."""

import pytest
from google.protobuf.duration_pb2 import Duration

from kimia.client import Answer, ClientTimes, StageLatency, Usage
from kimia.client.events import read_done, seconds
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.turn_pb2 import STAGE_NAME_LLM, STAGE_NAME_TOKENIZER, STOP_REASON_TEXT_EOS

pytestmark = pytest.mark.unit

LATENCY = pb.Latency(
    first_text=Duration(nanos=250_000_000),
    total=Duration(seconds=2),
    stages=[
        pb.StageLatency(stage=STAGE_NAME_TOKENIZER, queued=Duration(), claimed=Duration(nanos=1_000_000)),
        pb.StageLatency(
            stage=STAGE_NAME_LLM, done=Duration(seconds=1), compute=Duration(nanos=5), worker="w", take_overs=1
        ),
    ],
)


def test_the_end_of_an_answer() -> None:
    done = read_done(
        "a.b",
        pb.TurnDone(text="Hi", stop=STOP_REASON_TEXT_EOS, usage=pb.Usage(prompt_positions=3, steps=2), latency=LATENCY),
    )
    assert (done.turn_id, done.text, done.stop, done.usage) == ("a.b", "Hi", "text_eos", Usage(3, 2, 0, 0, 0))
    assert (done.latency.first_text, done.latency.first_audio, done.latency.total) == (0.25, None, 2.0)
    assert done.latency.stages == (
        StageLatency("tokenizer", 0.0, 0.001, None, None, None, "", 0),
        StageLatency("llm", None, None, None, 1.0, 5e-9, "w", 1),
    )


def test_a_duration_of_zero_is_not_nothing() -> None:
    assert seconds(pb.StageLatency(queued=Duration()), "queued") == 0.0
    assert seconds(pb.StageLatency(), "queued") is None


def test_the_length_of_an_answer() -> None:
    done = read_done("a.b", pb.TurnDone(usage=pb.Usage(audio_samples=12000)))

    def answer(rate: int) -> Answer:
        return Answer("", b"", rate, "s16le", "a.b", "a", 1, done.stop, done.usage, done.latency, ClientTimes())

    assert answer(24000).seconds == 0.5
    assert answer(0).seconds == 0.0
