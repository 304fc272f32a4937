"""The stages in a row against the plain pipeline: the same ids, text, chunks and samples."""

import pytest

from kimia.v1.audio_pb2 import AudioFormat
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, Message, Spoken, Text, TrackSampling
from tests.services.turns import (
    CALL,
    FILE,
    PCM16,
    QUESTION,
    heard,
    pcm_of,
    plain,
    sound_log,
    spoken,
    staged,
    text,
    turn,
)

pytestmark = pytest.mark.parity

GREEDY: tuple[dict, dict] = ({}, {})
SAMPLED: tuple[dict, dict] = (
    {
        "text": TrackSampling(temperature=0.7, top_k=8),
        "audio": TrackSampling(temperature=0.8, top_k=10, repetition_penalty=1.1, repetition_window=20),
    },
    {
        "text_temperature": 0.7,
        "text_top_k": 8,
        "audio_temperature": 0.8,
        "audio_top_k": 10,
        "audio_repetition_penalty": 1.1,
        "audio_repetition_window_size": 20,
    },
)
ASK = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]


@pytest.mark.parametrize("preset", ["low-latency", "upstream"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_spoken_question(model, stages, preset: str, sampling: tuple[dict, dict]) -> None:
    options = {"preset": preset, "max_new_tokens": 55}
    expected, done = plain(model, ASK, seed=11, **options, **sampling[1])
    asked = turn([heard()], seed=11, **options, **sampling[0])
    outcome, logs = await staged(stages, asked, sound_log(QUESTION.read_bytes()))
    assert outcome == expected
    assert len(outcome.pcm) > (sampling is SAMPLED)
    steps = [chunk.step for chunk in logs["llm"]]
    assert tuple(step.text_id for step in steps if step.in_transcript) == done.result.text_ids
    assert [step.speaking for step in steps] == [i >= model.config.audio_delay for i in range(len(steps))]


@pytest.mark.parametrize("form", [FILE, PCM16], ids=["file", "pcm"])
async def test_speech_recognition(model, stages, form: AudioFormat) -> None:
    ask = [{"role": "user", "message_type": "text", "content": "Please transcribe:"}, *ASK]
    expected, _ = plain(model, ask, "text", max_new_tokens=30)
    log = sound_log(QUESTION.read_bytes() if form is FILE else pcm_of(QUESTION), piece=3201)
    asked = turn([text("Please transcribe:"), heard(form=form)], "tokenizer llm", output_type="text", max_new_tokens=30)
    outcome, logs = await staged(stages, asked, log)
    assert outcome == expected
    assert outcome.pcm == []
    assert logs["tokenizer"][-1].report.units == 1
    assert not any(chunk.step.speaking or chunk.step.HasField("code") for chunk in logs["llm"])


@pytest.mark.parametrize(
    ("output_type", "route"), [("text", "llm"), ("both", "llm detokenizer")], ids=["text", "text and speech"]
)
async def test_a_written_question(model, stages, output_type: str, route: str) -> None:
    ask = [{"role": "user", "message_type": "text", "content": "How are you? 你好"}]
    expected, _ = plain(model, ask, output_type, max_new_tokens=40, seed=5, **SAMPLED[1])
    asked = turn([text("How are you? 你好")], route, 5, output_type=output_type, max_new_tokens=40, **SAMPLED[0])
    outcome, _ = await staged(stages, asked)
    assert outcome == expected


async def test_two_clips_of_different_rates_and_text(model, stages) -> None:
    ask = [{"role": "user", "message_type": "audio", "content": str(CALL)}, *ASK]
    ask.append({"role": "user", "message_type": "text", "content": "Well?"})
    expected, _ = plain(model, ask, max_new_tokens=30, seed=2)
    asked = turn([heard(0), heard(1), text("Well?")], seed=2, max_new_tokens=30)
    outcome, logs = await staged(stages, asked, sound_log(CALL.read_bytes(), QUESTION.read_bytes()))
    assert outcome == expected
    assert logs["tokenizer"][-1].report.units == 2


@pytest.mark.parametrize("preset", ["low-latency", "upstream"])
async def test_saying_a_text(model, stages, preset: str) -> None:
    said = "Your order is on its way."
    expected, _ = plain(model, (), say=said, max_new_tokens=50, seed=3, preset=preset, **SAMPLED[1])
    asked = turn([], "llm detokenizer", 3, say=said, max_new_tokens=50, preset=preset, **SAMPLED[0])
    outcome, _ = await staged(stages, asked)
    assert outcome == expected
    assert said in outcome.text


async def test_spoken_history_as_sound(model, stages) -> None:
    history = {"role": "assistant", "message_type": "audio-text", "content": [str(QUESTION), "Sure."]}
    expected, _ = plain(model, [*ASK, history, *ASK], max_new_tokens=20)
    asked = turn([heard(0), spoken("Sure.", number=1, format=FILE), heard(2)], max_new_tokens=20)
    outcome, logs = await staged(stages, asked, sound_log(*[QUESTION.read_bytes()] * 3))
    assert outcome == expected
    assert [bool(chunk.encoded.features) for chunk in logs["tokenizer"]] == [True, True, False, False, True, True]


@pytest.mark.parametrize("heard_codes", [None, 5, 0])
async def test_two_turns_with_memory_by_ids(model, stages, heard_codes: int | None) -> None:
    options = {"max_new_tokens": 30, "seed": 11}
    _, first = plain(model, ASK, **options, **SAMPLED[1])
    again = {"role": "user", "message_type": "text", "content": "And then?"}
    memory = first.message(heard_codes)
    expected, _ = plain(model, [*ASK, memory, again], **options, **SAMPLED[1])

    _, logs = await staged(
        stages, turn([heard()], seed=11, max_new_tokens=30, **SAMPLED[0]), sound_log(QUESTION.read_bytes())
    )
    steps = [chunk.step for chunk in logs["llm"]]
    codes = [step.code for step in steps if step.HasField("code")][:heard_codes]
    ids = [step.text_id for step in steps[: model.config.audio_delay + len(codes)] if step.in_transcript]
    assert (ids, len(codes)) == (memory["text_tokens"], len(memory["audio_tokens"]))
    answer = Message(role=ROLE_ASSISTANT, spoken=Spoken(clip={"codes": codes}, transcript=Text(ids=ids)))
    second = turn([heard(), answer, text("And then?")], seed=11, max_new_tokens=30, **SAMPLED[0])
    outcome, _ = await staged(stages, second, sound_log(QUESTION.read_bytes()))
    assert outcome == expected


async def test_features_that_are_known_already_need_no_tokenizer(model, stages) -> None:
    """The `encoded` log of an earlier turn, as a worker replays it from blobs."""
    expected, _ = plain(model, ASK, max_new_tokens=12)
    _, logs = await staged(stages, turn([heard()], max_new_tokens=1), sound_log(QUESTION.read_bytes()))
    asked = turn([heard()], "llm detokenizer", max_new_tokens=12)
    asked.messages[0].audio.feature_keys.append("key")
    outcome, _ = await staged(stages, asked, logs["tokenizer"])
    assert outcome == expected
