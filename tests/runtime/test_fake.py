"""The fakes keep the contract of kimia.stage, and what they give out shows loss, repetition and change of order."""

import asyncio

import pytest

from kimia.errors import AudioError, ParameterError
from kimia.runtime.fake import (
    BLANK,
    CODE_SAMPLES,
    DELAY,
    MSG_END,
    TEXT_EOS,
    TOKEN_OFFSET,
    FakeDetokenizer,
    FakeLanguageModel,
    FakeSettings,
    FakeTiming,
    FakeTokenizer,
    build,
    read_pcm,
    write_pcm,
)
from kimia.stage import STAGES
from kimia.v1.audio_pb2 import ENCODING_MULAW, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT, ROLE_USER, Message, Spoken, Text, TurnOptions
from kimia.v1.turn_pb2 import (
    STOP_REASON_AUDIO_EOD,
    STOP_REASON_MAX_NEW_TOKENS,
    STOP_REASON_TEXT_EOS,
    Chunk,
    InputAudio,
    Step,
    Turn,
)

pytestmark = pytest.mark.unit

PCM = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
CODE_BYTES = 2560


def turn_of(*clips, **fields):
    messages = [Message(role=ROLE_USER, audio=Clip(format=PCM, number=number)) for number in clips]
    return Turn(id="s.t", session_id="s", seed=7, messages=messages, **fields)


def sound(codes, salt=1):
    return bytes((salt * 31 + i // CODE_BYTES * 7 + i) % 251 for i in range(codes * CODE_BYTES))


def pieces(*clips, size=4000):
    """The input log of clips (number, bytes), cut into pieces."""
    parts = [(n, data[at : at + size], at + size >= len(data)) for n, data in clips for at in range(0, len(data), size)]
    return [
        Chunk(index=i, input=InputAudio(clip=n, data=data, clip_end=end), final=i == len(parts) - 1)
        for i, (n, data, end) in enumerate(parts)
    ]


async def replay(chunks):
    for chunk in chunks:
        yield chunk


async def gather(stage, turn, inbox, published=()):
    return [chunk async for chunk in stage.run(turn, replay(inbox), published)]


def assert_legal(chunks, start=0):
    assert [chunk.index for chunk in chunks] == list(range(start, start + len(chunks)))
    assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.HasField("report") for chunk in chunks] == [chunk.final for chunk in chunks]


async def tokens(turn, inbox=(), **timing):
    return await gather(FakeLanguageModel(FakeTiming(**timing)), turn, inbox)


# ---- all stages -------------------------------------------------------------------------------------------------


async def every_log():
    """(stage, turn, inbox, chunks) of the three stages of one turn."""
    turn = turn_of(0, 1)
    logs = [pieces((0, sound(30)), (1, sound(5, salt=2)))]
    cases = []
    for name in STAGES:
        stage = build(name, FakeTiming(steps=60))
        logs.append(await gather(stage, turn, logs[-1]))
        cases.append((stage, turn, logs[-2], logs[-1]))
    return cases


async def test_every_stage_ends_with_one_final_chunk_and_its_report():
    for *_, chunks in await every_log():
        assert_legal(chunks)
        assert chunks[-1].report.units > 0


async def test_every_stage_goes_on_from_what_was_published_with_the_same_chunks():
    for stage, turn, inbox, chunks in await every_log():
        for published in range(len(chunks)):
            rest = await gather(stage, turn, inbox, chunks[:published])
            assert rest == chunks[published:]


async def test_timing_is_spent_and_reported(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    turn = turn_of(0)
    inbox = pieces((0, sound(5)))
    timing = FakeTiming(clip_seconds=3, prefill_seconds=2, step_seconds=0.5, realtime_factor=0.25, steps=17)
    for name, expected in (("tokenizer", 3), ("llm", 2 + 17 * 0.5), ("detokenizer", 10 * 0.08 * 0.25)):
        slept.clear()
        inbox = await gather(build(name, timing), turn, inbox)
        assert sum(slept) == pytest.approx(expected)
        assert inbox[-1].report.compute_seconds == pytest.approx(expected)


async def test_without_timing_nothing_sleeps(monkeypatch):
    async def sleep(_):
        raise AssertionError("slept")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await every_log()


async def test_replayed_steps_take_no_time(monkeypatch):
    turn = turn_of()
    chunks = await tokens(turn, steps=20)
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await gather(FakeLanguageModel(FakeTiming(step_seconds=1, steps=20)), turn, [], chunks[:15])
    assert len(slept) == 5


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("KIMIA_FAKE_STEP_SECONDS", "0.5")
    monkeypatch.setenv("KIMIA_FAKE_STEPS", "9")
    timing = FakeSettings().timing()
    assert (timing.step_seconds, timing.steps) == (0.5, 9)


# ---- tokenizer --------------------------------------------------------------------------------------------------


async def test_clips_become_stretches_of_one_code_per_80_ms():
    chunks = await gather(FakeTokenizer(), turn_of(0, 1), pieces((0, sound(30)), (1, sound(5, 2))))
    assert [len(c.encoded.codes) for c in chunks] == [12, 12, 6, 5]
    assert [c.encoded.clip for c in chunks] == [0, 0, 0, 1]
    assert [c.encoded.clip_end for c in chunks] == [False, False, True, True]
    assert all(len(c.encoded.features) == 4 * 2 * len(c.encoded.codes) for c in chunks)


async def test_codes_hash_the_bytes_and_not_the_pieces():
    whole = await gather(FakeTokenizer(), turn_of(0), pieces((0, sound(9))))
    cut = await gather(FakeTokenizer(), turn_of(0), pieces((0, sound(9)), size=777))
    other = await gather(FakeTokenizer(), turn_of(0), pieces((0, sound(9, salt=3))))
    assert whole == cut
    assert whole[0].encoded.codes != other[0].encoded.codes


async def test_spoken_clips_have_codes_only_and_the_format_counts():
    clip = Clip(number=0, format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000))
    turn = Turn(messages=[Message(spoken=Spoken(clip=clip, transcript=Text(text="so")))])
    (chunk,) = await gather(FakeTokenizer(), turn, pieces((0, bytes(1280))))
    assert (len(chunk.encoded.codes), chunk.encoded.features) == (2, b"")


@pytest.mark.parametrize(
    "inbox",
    [
        [],
        [Chunk(input=InputAudio(clip=0, data=b"abc"), final=True)],
        [Chunk(input=InputAudio(clip=0, clip_end=True), final=True)],
        pieces((4, b"abc")),
    ],
    ids=["nothing", "within a clip", "empty clip", "unknown clip"],
)
async def test_unusable_sound_is_refused(inbox):
    with pytest.raises(AudioError):
        await gather(FakeTokenizer(), turn_of(0), inbox)


# ---- language model ---------------------------------------------------------------------------------------------


async def test_text_leads_the_audio_by_the_delay():
    chunks = await tokens(turn_of(), steps=20)
    steps = [chunk.step for chunk in chunks]
    assert [s.audio_id for s in steps[:DELAY]] == [BLANK] * DELAY
    assert all(s.code == s.audio_id - TOKEN_OFFSET for s in steps[DELAY:-1])
    assert steps[-1].audio_id == MSG_END
    assert not steps[-1].HasField("code")
    assert [s.stop for s in steps] == [0] * 19 + [STOP_REASON_AUDIO_EOD]
    assert [s.text_id for s in steps].index(TEXT_EOS) == 7
    assert all(s.text for s in steps[:7])
    assert [s.in_transcript for s in steps] == [True] * 7 + [False] * 13
    assert [s.speaking for s in steps] == [False] * DELAY + [True] * 14
    assert {(s.text_id, s.text) for s in steps[8:]} == {(BLANK, "")}


async def test_text_answers_have_no_codes_and_end_with_the_text():
    chunks = await tokens(turn_of(options=TurnOptions(output_type=OUTPUT_TYPE_TEXT)), steps=20)
    assert_legal(chunks)
    assert {c.step.audio_id for c in chunks} == {BLANK}
    assert not any(c.step.HasField("code") or c.step.speaking for c in chunks)
    assert [c.step.in_transcript for c in chunks] == [True] * 19 + [False]
    assert (chunks[-1].step.text_id, chunks[-1].step.stop) == (TEXT_EOS, STOP_REASON_TEXT_EOS)


async def test_the_budget_cuts_the_answer_off():
    full = await tokens(turn_of(), steps=20)
    cut = await tokens(turn_of(options=TurnOptions(max_new_tokens=11)), steps=20)
    assert_legal(cut)
    assert cut[-1].step.stop == STOP_REASON_MAX_NEW_TOKENS
    assert [c.step.audio_id for c in cut] == [c.step.audio_id for c in full[:11]]


async def test_a_large_budget_changes_nothing():
    assert await tokens(turn_of(options=TurnOptions(max_new_tokens=999))) == await tokens(turn_of())


async def test_ids_depend_on_seed_codes_and_features():
    base = await gather(FakeTokenizer(), turn_of(0), pieces((0, sound(3))))
    lost = [Chunk.FromString(c.SerializeToString()) for c in base]
    lost[0].encoded.features = b""
    shorter = [Chunk.FromString(c.SerializeToString()) for c in base]
    del shorter[0].encoded.codes[-1]
    other = turn_of(0)
    other.seed = 8
    answers = [await tokens(turn_of(0), inbox) for inbox in (base, lost, shorter)] + [await tokens(other, base)]
    assert len({tuple(c.step.audio_id for c in answer) for answer in answers}) == 4
    assert await tokens(turn_of(0), base) == answers[0]


async def test_say_speaks_the_given_text():
    chunks = await tokens(turn_of(say="Good morning to  you"))
    assert "".join(c.step.text for c in chunks) == "Good morning to  you"
    assert_legal(chunks)
    assert sum(c.step.HasField("code") for c in chunks) == 16


async def test_nothing_to_say_is_refused():
    with pytest.raises(ParameterError):
        await tokens(turn_of(say=" "))


# ---- detokenizer ------------------------------------------------------------------------------------------------


async def spoken(codes, **options):
    steps = [Chunk(index=i, step=Step(audio_id=TOKEN_OFFSET + c, code=c)) for i, c in enumerate(codes)]
    steps.append(Chunk(index=len(codes), step=Step(audio_id=MSG_END), final=True))
    return await gather(FakeDetokenizer(), turn_of(options=TurnOptions(**options)), steps)


async def test_pushes_follow_the_schedule_of_the_preset():
    sizes = [len(c.speech.pcm) // (2 * CODE_SAMPLES) for c in await spoken(range(100))]
    assert sizes == [6, 12, 24, 37, 21]
    sizes = [len(c.speech.pcm) // (2 * CODE_SAMPLES) for c in await spoken(range(73), preset="upstream")]
    assert sizes == [18, 30, 25]


async def test_the_first_chunk_needs_the_look_ahead_and_nothing_more():
    assert len(await spoken(range(9))) == 1
    assert len(await spoken(range(10))) == 2


async def test_every_code_is_spoken_once_in_order():
    codes = [(n * 7919) % 16384 for n in range(150)]
    chunks = await spoken(codes)
    assert_legal(chunks)
    assert read_pcm(b"".join(c.speech.pcm for c in chunks)) == list(enumerate(codes))


async def test_an_answer_without_codes_ends_with_an_empty_chunk():
    (chunk,) = await spoken([])
    assert (chunk.final, chunk.speech.pcm, chunk.report.units) == (True, b"", 0)


async def test_an_unknown_preset_is_refused():
    with pytest.raises(ParameterError, match="low-latency"):
        await spoken([1], preset="fast")


def test_lost_or_repeated_samples_show():
    pcm = write_pcm(0, 5) + write_pcm(1, 9)
    assert read_pcm(pcm) == [(0, 5), (1, 9)]
    with pytest.raises(AudioError):
        read_pcm(pcm[:-2])
    with pytest.raises(AudioError):
        read_pcm(pcm[2:] + pcm[:2])
