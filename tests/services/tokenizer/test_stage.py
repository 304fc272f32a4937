"""The tokenizer stage alone: pieces of clips, resumption, interleaving, and bad sound."""

import asyncio

import numpy as np
import pytest
import torch

from kimia.compute import ComputeThread, feature_rows
from kimia.errors import AudioError, ConversationError, RequestError, StateError
from kimia.runtime.settings import Settings
from kimia.sound import decode, encode
from kimia.v1.audio_pb2 import (
    ENCODING_ALAW,
    ENCODING_MULAW,
    ENCODING_PCM_F32LE,
    ENCODING_PCM_S16LE,
    ENCODING_UNSPECIFIED,
    AudioFormat,
)
from kimia.v1.turn_pb2 import Chunk, InputAudio
from services.tokenizer.stage import STRETCH, TokenizerStage
from tests.golden_data import golden
from tests.model.plain_encoder import speech_like
from tests.model.test_encode import checkpoint as short_checkpoint
from tests.model.test_encode import load as load_encoder
from tests.services.turns import CALL, FILE, PCM16, QUESTION, heard, pcm_of, ran, replayed, sound_log, spoken, turn

pytestmark = pytest.mark.parity

TWO = [heard(0), spoken("Sure.", number=1, format=FILE)]


@pytest.fixture
def stage(stages) -> TokenizerStage:
    return stages["tokenizer"]


@pytest.fixture(scope="module")
def two_log() -> list[Chunk]:
    return sound_log(QUESTION.read_bytes(), CALL.read_bytes())


def without_time(chunks: list[Chunk]) -> list[Chunk]:
    for chunk in chunks:
        chunk.report.compute_seconds = 0
    return chunks


def joined(chunks: list[Chunk]) -> tuple[list[int], torch.Tensor]:
    """Codes and features of a turn with one clip."""
    pieces = [chunk.encoded for chunk in chunks]
    rows = [feature_rows(piece.features, piece.feature_type, piece.feature_width) for piece in pieces]
    return [code for piece in pieces for code in piece.codes], torch.cat(rows)


# ---- what comes out ---------------------------------------------------------------------------------------------


async def test_pieces_of_a_second_make_the_clip(stage: TokenizerStage) -> None:
    chunks = await ran(stage, turn([heard()]), sound_log(QUESTION.read_bytes()))
    codes, features = joined(chunks)
    samples = decode(pcm_of(QUESTION), PCM16)
    [whole] = stage.encoder.encode([samples])
    assert tuple(codes) == whole.codes
    assert torch.equal(features, whole.features)
    assert [len(chunk.encoded.codes) for chunk in chunks] == [STRETCH, len(codes) - STRETCH]
    assert [chunk.encoded.clip_end for chunk in chunks] == [False, True]
    assert [chunk.final for chunk in chunks] == [False, True]
    assert chunks[-1].report.units == 1
    assert chunks[-1].report.compute_seconds > 0


@pytest.mark.parametrize("encoding", [ENCODING_PCM_S16LE, ENCODING_PCM_F32LE, ENCODING_MULAW, ENCODING_ALAW])
@pytest.mark.parametrize("rate", [8000, 48000])
async def test_formats_of_the_wire(stage: TokenizerStage, encoding: int, rate: int) -> None:
    """The same as the plain reading of the same samples."""
    from kimia.model.audio import prepare_waveform

    form = AudioFormat(encoding=encoding, sample_rate=rate)
    tone = (0.5 * np.sin(np.arange(rate // 2) * 2 * np.pi * 440 / rate)).astype(np.float32)
    data = encode(tone, form)
    codes, features = joined(await ran(stage, turn([heard(form=form)]), sound_log(data)))
    [whole] = stage.encoder.encode([prepare_waveform(decode(data, form), rate, stage.encoder.sample_rate)])
    assert tuple(codes) == whole.codes
    assert torch.equal(features, whole.features)


async def test_spoken_history_has_codes_only(stage: TokenizerStage, two_log: list[Chunk]) -> None:
    chunks = await ran(stage, turn(TWO), two_log)
    assert {chunk.encoded.clip: bool(chunk.encoded.features) for chunk in chunks} == {0: True, 1: False}
    assert chunks[-1].report.units == 2


async def test_a_clip_leaves_before_the_next_one_has_come(stage: TokenizerStage, two_log: list[Chunk]) -> None:
    first = [chunk for chunk in two_log if chunk.input.clip == 0]
    waiting = asyncio.Event()

    async def inbox():
        for chunk in first:
            yield chunk
        waiting.set()
        await asyncio.Event().wait()

    chunks = stage.run(turn(TWO), inbox())
    assert (await anext(chunks)).encoded.clip == 0
    assert (await anext(chunks)).encoded.clip_end
    assert not waiting.is_set()
    await chunks.aclose()


async def test_clips_may_arrive_mixed_and_the_end_may_come_alone(stage: TokenizerStage, two_log: list[Chunk]) -> None:
    one, two = ([chunk for chunk in two_log if chunk.input.clip == number] for number in (0, 1))
    mixed = [chunk for pair in zip(two, one, strict=False) for chunk in pair]
    mixed += [*one[len(two) :], *two[len(one) :]]
    plain = [Chunk(input=chunk.input) for chunk in mixed] + [Chunk(final=True)]
    chunks = await ran(stage, turn(TWO), plain)
    assert chunks[-1].final
    assert not chunks[-1].HasField("encoded")
    assert chunks[-1].report.units == 2
    straight = await ran(stage, turn(TWO), two_log)
    for number in (0, 1):
        told = [chunk.encoded for chunk in chunks if chunk.HasField("encoded") and chunk.encoded.clip == number]
        assert told == [chunk.encoded for chunk in straight if chunk.encoded.clip == number]


# ---- long clips -------------------------------------------------------------------------------------------------


@pytest.fixture
def short_stage(tmp_path):
    """A stage whose segments have two seconds."""
    compute = ComputeThread()
    yield TokenizerStage(load_encoder(short_checkpoint(tmp_path)), compute)
    compute.close()


def long_turn(seconds: float):
    data = encode(speech_like(round(16000 * seconds)), PCM16)
    return turn([heard(form=PCM16)]), sound_log(data, piece=6400), decode(data, PCM16)


async def test_a_finished_segment_is_encoded_while_the_caller_speaks(short_stage: TokenizerStage) -> None:
    asked, log, samples = long_turn(5.3)
    ends: list[int] = []  # pieces that had come when a chunk was given out

    async def inbox():
        for chunk in log:
            ends.append(chunk.index)
            yield chunk

    chunks, came = [], []
    async for chunk in short_stage.run(asked, inbox()):
        chunks.append(chunk)
        came.append(ends[-1])
    assert [len(chunk.encoded.codes) for chunk in chunks] == [12, 12, 1, 12, 12, 1, 12, 5]
    assert came == [12] * 3 + [22] * 3 + [26] * 2  # of 0.2 s: half a second behind each segment, and at the end
    [whole] = short_stage.encoder.encode([samples])
    codes, features = joined(chunks)
    assert tuple(codes) == whole.codes
    assert torch.equal(features, whole.features)


async def test_going_on_encodes_only_the_segments_that_are_missing(short_stage: TokenizerStage, monkeypatch) -> None:
    asked, log, _ = long_turn(5.3)
    whole = without_time(await ran(short_stage, asked, log))
    counted: list[int] = []
    plain = short_stage.encoder.encode_segments

    def counting(batch):
        counted.append(len(batch))
        return plain(batch)

    monkeypatch.setattr(short_stage.encoder, "encode_segments", counting)
    for given, left in ((2, 3), (3, 2), (4, 2), (6, 1), (7, 1)):
        counted.clear()
        assert without_time(await ran(short_stage, asked, log, whole[:given])) == whole[given:]
        assert sum(counted) == left
    assert not whole[6].encoded.clip_end
    counted.clear()
    [end] = await ran(
        short_stage, asked, [*log[:-1], Chunk(input=log[-1].input, final=True)], [*whole[:-1], _open(whole[-1])]
    )
    assert end.final
    assert not end.HasField("encoded")
    assert not counted


def _open(chunk: Chunk) -> Chunk:
    """The same, when its log goes on."""
    return Chunk(index=chunk.index, encoded=chunk.encoded)


async def test_a_long_clip_keeps_a_short_one_waiting_for_one_segment_at_most(short_stage: TokenizerStage) -> None:
    asked, log, _ = long_turn(20)
    order: list[str] = []
    begun = asyncio.Event()

    async def long() -> None:
        async for _ in short_stage.run(
            asked,
            replayed([Chunk(input=InputAudio(data=b"".join(c.input.data for c in log), clip_end=True), final=True)]),
        ):
            order.append("long")
            begun.set()

    async def short() -> None:
        await begun.wait()
        await ran(short_stage, *long_turn(1)[:2])
        order.append("short")

    await asyncio.gather(long(), short())
    assert order.index("short") <= 3 * 4  # chunks of a segment, of ten segments


# ---- again ------------------------------------------------------------------------------------------------------


async def test_every_interrupted_run_goes_on_as_if_undisturbed(
    stage: TokenizerStage, two_log: list[Chunk], monkeypatch
) -> None:
    whole = without_time(await ran(stage, turn(TWO), two_log))
    for given in range(len(whole) + 1):
        rest = without_time(await ran(stage, turn(TWO), two_log, whole[:given]))
        assert rest == whole[given:]
    monkeypatch.setattr(stage.encoder, "encode", lambda waves: pytest.fail("encoded again"))
    clip_end = next(chunk.index for chunk in whole if chunk.encoded.clip_end)
    await ran(stage, turn(TWO), two_log, whole[: clip_end + 1])


async def test_two_turns_at_once_are_as_each_alone(stage: TokenizerStage, two_log: list[Chunk]) -> None:
    other = sound_log(CALL.read_bytes())
    alone = [await ran(stage, turn(TWO), two_log), await ran(stage, turn([heard()]), other)]
    together = await asyncio.gather(ran(stage, turn(TWO), two_log), ran(stage, turn([heard()]), other))
    assert [without_time(chunks) for chunks in together] == [without_time(chunks) for chunks in alone]


async def test_a_turn_without_new_sound_ends_at_once(stage: TokenizerStage) -> None:
    asked = turn([heard()])
    asked.messages[0].audio.feature_keys.append("key")
    [chunk] = await ran(stage, asked, [Chunk(final=True)])
    assert chunk.final
    assert chunk.report.units == 0


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "data", "rule"),
    [
        (FILE, b"no sound at all, but some text", "not audio"),
        (FILE, QUESTION.read_bytes()[:40], "audio"),
        (PCM16, bytes(321), "whole number"),
        (AudioFormat(encoding=ENCODING_PCM_F32LE, sample_rate=16000), b"\x00\x00\xc0\x7f" * 100, "NaN"),
        (PCM16, b"", "empty"),
    ],
    ids=["text", "cut header", "odd bytes", "NaN", "empty"],
)
async def test_bad_sound_is_named_by_its_message(stage: TokenizerStage, form, data: bytes, rule: str) -> None:
    log = [Chunk(input=InputAudio(clip=4, data=data, clip_end=True), final=True)]
    with pytest.raises(AudioError, match=rf"message 1: .*{rule}"):
        await ran(stage, turn([spoken("Yes.", codes=[1]), heard(4, form)]), log)


async def test_a_wrong_format_is_named_by_its_field(stage: TokenizerStage) -> None:
    wrong = [AudioFormat(encoding=ENCODING_UNSPECIFIED), AudioFormat(encoding=ENCODING_MULAW, sample_rate=11025)]
    for form, field in zip(wrong, ("encoding", "sample_rate"), strict=True):
        with pytest.raises(RequestError) as caught:
            await ran(stage, turn([heard(form=form)]), sound_log(bytes(1000)))
        assert caught.value.field == f"messages[0].audio.format.{field}"


@pytest.mark.parametrize(
    ("log", "error", "rule"),
    [
        ([Chunk(input=InputAudio(data=b"ab"), final=True)], AudioError, "message 0: .*cut off"),
        ([Chunk(final=True)], AudioError, "message 0: .*never came"),
        ([Chunk(input=InputAudio(data=b"ab"))], StateError, "`input`"),
        ([Chunk(input=InputAudio(clip=9, data=b"ab"))], ConversationError, "clip 9"),
    ],
    ids=["no end", "nothing", "no final chunk", "unknown clip"],
)
async def test_sound_that_is_not_whole(stage: TokenizerStage, log, error, rule: str) -> None:
    with pytest.raises(error, match=rule):
        await ran(stage, turn([heard(form=PCM16)]), log)


async def test_sound_after_the_end_of_its_clip(stage: TokenizerStage) -> None:
    log = [*sound_log(pcm_of(QUESTION)), Chunk(input=InputAudio(data=b"ab"))]
    log[-2].final = False
    with pytest.raises(AudioError, match=r"message 0: .*after the end"):
        await ran(stage, turn([heard(form=PCM16)]), log)


# ---- as a process loads it --------------------------------------------------------------------------------------


async def test_loaded_by_settings_and_warmed_up(stage: TokenizerStage) -> None:
    settings = Settings(model=str(golden("e2e") / "model"), device="cpu", threads=1)
    loaded = TokenizerStage.load(settings)
    await loaded.warm_up()
    narrow = TokenizerStage.load(Settings(model=settings.model, device="cpu", dtype="bfloat16"))
    assert len({loaded.fingerprint, narrow.fingerprint}) == 2
    log = sound_log(QUESTION.read_bytes())
    here, there = await ran(stage, turn([heard()]), log), await ran(loaded, turn([heard()]), log)
    assert joined(here)[0] == joined(there)[0]
    half = joined(await ran(narrow, turn([heard()]), log))[1]
    assert half.dtype == torch.bfloat16
    for each in (loaded, narrow):
        each.compute.close()
