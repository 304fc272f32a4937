"""Stages with no model: the contract of `kimia.stage` kept to the letter, the time that each takes configured.

They carry the tests, the load tests and the gateways. What they give out is a pure function of what they read, made so
that any loss, repetition or change of order shows: codes come from the bytes of a clip, the answer's ids from the seed
and everything encoded, and every sample of speech says which code it belongs to (`read_pcm`).

    python -m kimia.runtime.fake llm        # one as a process, timed by KIMIA_FAKE_STEP_SECONDS and the like
"""

from __future__ import annotations

import argparse
import asyncio
import re
import struct
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic_settings import BaseSettings, SettingsConfigDict

from kimia.clips import SEGMENT_POSITIONS, early_segments
from kimia.errors import AudioError, ParameterError
from kimia.model.chunking import ChunkPlanner
from kimia.model.schedule import find_schedule
from kimia.stage import CODE_SECONDS, DETOKENIZER, LLM, STAGES, TOKENIZER, Stage, StageKind
from kimia.v1.audio_pb2 import ENCODING_ALAW, ENCODING_MULAW, ENCODING_PCM_F32LE, AudioFormat
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT
from kimia.v1.turn_pb2 import (
    FEATURE_TYPE_F32,
    STOP_REASON_AUDIO_EOD,
    STOP_REASON_MAX_NEW_TOKENS,
    STOP_REASON_TEXT_EOS,
    STOP_REASON_UNSPECIFIED,
    Chunk,
    Encoded,
    InputAudio,
    Speech,
    StageReport,
    Step,
    StopReason,
    Turn,
)

SAMPLE_RATE = 24000  # Hz
CODE_SAMPLES = round(SAMPLE_RATE * CODE_SECONDS)  # of one semantic token
CODES = 16384
TOKEN_OFFSET = 152064  # id of code 0 on the audio track, as in the released checkpoint
BLANK, TEXT_EOS, MSG_END = 151666, 151667, 151645
DELAY = 6  # steps by which text leads audio
STRETCH = 12  # codes of an `encoded` chunk at most
FEATURE_WIDTH = 2
MEL_BYTES = 4 * 80 * 4  # of one semantic token: mel frames, bins, float32, as in the released checkpoint

WORDS = ("yes ", "the ", "line ", "is ", "open ", "and ", "we ", "hear ", "你好", "all ", "of ", "it ")


@dataclass(frozen=True)
class FakeTiming:
    """How long things take (seconds; 0 does not even yield to the loop), and how long an answer is."""

    clip_seconds: float = 0.0  # to encode one clip
    prefill_seconds: float = 0.0  # to read the prompt, replayed steps included
    step_seconds: float = 0.0  # one step of the language model
    realtime_factor: float = 0.0  # seconds of computing per second of speech
    steps: int = 40  # of an answer that nothing cuts short, at least 8


async def _spend(seconds: float) -> float:
    if seconds > 0:
        await asyncio.sleep(seconds)
    return seconds


def _hash(seed: int, *values: int) -> int:
    return zlib.crc32(struct.pack(f"<{len(values)}Q", *values), seed & 0xFFFFFFFF)


# ---- tokenizer --------------------------------------------------------------------------------------------------


class FakeTokenizer:
    """Clips to codes that hash their bytes, with two features per code: the code and its position."""

    kind: StageKind = TOKENIZER

    def __init__(self, timing: FakeTiming = FakeTiming()) -> None:
        self.timing = timing

    async def warm_up(self) -> None:
        """Nothing happens only once here."""

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Encode every clip of the inbox, segment by segment as it arrives; what was given out costs nothing."""
        index, seconds = 0, 0.0
        clips: dict[int, _Clip] = {}
        held: Chunk | None = None  # until it is known whether it is the last: by `final`, or by the inbox's end
        async for chunk in inbox:
            number = chunk.input.clip
            clip = clips.setdefault(number, _Clip(number, *_layout(turn, number)))
            pieces = clip.take(chunk.input)
            if pieces and index + len(pieces) > len(published):
                seconds += await _spend(self.timing.clip_seconds)
            for encoded in pieces:
                if held is not None and held.index >= len(published):
                    yield held
                held, index = Chunk(index=index, encoded=encoded), index + 1
            if held is not None and not clip.ended:
                if held.index >= len(published):
                    yield held
                held = None
        if held is None or not all(clip.ended for clip in clips.values()):
            raise AudioError("the sound ends within a clip; mark its last piece as clip_end")
        held.final = True
        held.report.CopyFrom(StageReport(compute_seconds=seconds, units=len(clips)))
        if held.index >= len(published):
            yield held


class _Clip:
    """A clip as it arrives."""

    def __init__(self, number: int, form: AudioFormat, features: bool) -> None:
        self.ended = False
        self._number = number
        self._form = form
        self._features = features
        self._data = bytearray()
        self._segments = 0  # given out

    def take(self, piece: InputAudio) -> list[Encoded]:
        """The stretches that a piece completes: those of whole segments, at the end all. Raises AudioError."""
        self._data += piece.data
        self.ended = piece.clip_end
        given, self._segments = self._segments, early_segments(self._form, len(self._data))
        if not (self.ended or self._segments > given):
            return []
        code_bytes = _code_bytes(self._form)
        end = len(self._data) if self.ended else self._segments * SEGMENT_POSITIONS * code_bytes
        made = encode(self._number, bytes(self._data[:end]), code_bytes, self._features)
        pieces = list(made)[given * -(-SEGMENT_POSITIONS // STRETCH) :]
        pieces[-1].clip_end = self.ended
        return pieces


def _layout(turn: Turn, number: int) -> tuple[AudioFormat, bool]:
    """(format, whether features are read) of a clip."""
    for message in turn.messages:
        content = message.WhichOneof("content")
        clip = message.audio if content == "audio" else message.spoken.clip
        if content != "text" and clip.number == number:
            return clip.format, content == "audio"
    raise AudioError(f"clip {number} belongs to no message of the turn; send clips that the turn names")


def _code_bytes(form: AudioFormat) -> int:
    width = {ENCODING_PCM_F32LE: 4, ENCODING_MULAW: 1, ENCODING_ALAW: 1}.get(form.encoding, 2)
    return width * (form.sample_rate or 16000) * 8 // 100


def encode(number: int, data: bytes, code_bytes: int, features: bool) -> Iterator[Encoded]:
    """The stretches of one clip. Raises AudioError for a clip without sound."""
    if not data:
        raise AudioError(f"clip {number} is empty; leave it out")
    codes = [zlib.crc32(data[start : start + code_bytes]) % CODES for start in range(0, len(data), code_bytes)]
    starts = [at for begin in range(0, len(codes), SEGMENT_POSITIONS) for at in _starts(begin, len(codes))]
    for start, end in pairwise([*starts, len(codes)]):
        stretch = codes[start:end]
        encoded = Encoded(clip=number, codes=stretch, clip_end=end == len(codes))
        if features:
            encoded.features = b"".join(struct.pack("<2f", code, start + at) for at, code in enumerate(stretch))
            encoded.feature_type, encoded.feature_width = FEATURE_TYPE_F32, FEATURE_WIDTH
        yield encoded


def _starts(begin: int, end: int) -> range:
    """Where the stretches of a segment begin."""
    return range(begin, min(begin + SEGMENT_POSITIONS, end), STRETCH)


# ---- language model ---------------------------------------------------------------------------------------------


class FakeLanguageModel:
    """Answers of a fixed number of steps whose ids hash the seed, everything encoded, and the step."""

    kind: StageKind = LLM

    def __init__(self, timing: FakeTiming = FakeTiming()) -> None:
        self.timing = timing

    async def warm_up(self) -> None:
        """Nothing happens only once here."""

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Read the prompt, then take one step after another; replayed steps take no time of their own."""
        key, positions = _hash(0, turn.seed), len(turn.messages)
        async for chunk in inbox:
            key = zlib.crc32(chunk.encoded.features, _hash(key, *chunk.encoded.codes))
            positions += len(chunk.encoded.codes)
        answer = Answer.of(turn, key, self.timing.steps)
        seconds = await _spend(self.timing.prefill_seconds)
        for index in range(len(published), answer.steps):
            seconds += await _spend(self.timing.step_seconds)
            chunk = Chunk(index=index, step=answer.step(index))
            if index == answer.steps - 1:
                chunk.final = True
                chunk.report.CopyFrom(
                    StageReport(compute_seconds=seconds, prompt_positions=positions, units=answer.steps)
                )
            yield chunk


@dataclass(frozen=True)
class Answer:
    """An answer as a pure function of the step."""

    key: int
    words: tuple[str, ...]
    length: int  # steps until it ends by itself
    steps: int  # steps that the budget allows of them
    speaks: bool

    @classmethod
    def of(cls, turn: Turn, key: int, length: int) -> Answer:
        """The answer to a turn. Raises ParameterError when there is nothing to say."""
        speaks = turn.options.output_type != OUTPUT_TYPE_TEXT
        length = max(length, DELAY + 2)
        if turn.HasField("say"):
            words = tuple(re.findall(r"\s*\S+\s*", turn.say))
            if not words:
                raise ParameterError("there is nothing to say: the text is empty")
            length = DELAY + 1 + 4 * len(words)
        else:
            count = (length - DELAY) // 2 if speaks else length - 1
            words = tuple(WORDS[_hash(key, 3, index) % len(WORDS)] for index in range(count))
        limit = max(turn.options.max_new_tokens, 1) if turn.options.HasField("max_new_tokens") else length
        return cls(key, words, length, min(limit, length), speaks)

    def step(self, index: int) -> Step:
        """One step: what both tracks feed back, and what came of it."""
        step = Step(text_id=self._text_id(index), audio_id=self._audio_id(index), stop=self._stop(index))
        step.speaking = self.speaks and index >= DELAY
        step.in_transcript = index < len(self.words)
        if step.in_transcript:
            step.text = self.words[index]
        if step.audio_id >= TOKEN_OFFSET:
            step.code = step.audio_id - TOKEN_OFFSET
        return step

    def _text_id(self, index: int) -> int:
        if index < len(self.words):
            return _hash(self.key, 1, index) % 100000
        return TEXT_EOS if index == len(self.words) else BLANK

    def _audio_id(self, index: int) -> int:
        if not self.speaks or index < DELAY:
            return BLANK
        return MSG_END if index == self.length - 1 else TOKEN_OFFSET + _hash(self.key, 2, index) % CODES

    def _stop(self, index: int) -> StopReason.ValueType:
        if index < self.steps - 1:
            return STOP_REASON_UNSPECIFIED
        if self.steps < self.length:
            return STOP_REASON_MAX_NEW_TOKENS
        return STOP_REASON_AUDIO_EOD if self.speaks else STOP_REASON_TEXT_EOS


# ---- detokenizer ------------------------------------------------------------------------------------------------


class FakeDetokenizer:
    """Codes to samples that say which code they belong to, cut as the preset cuts."""

    kind: StageKind = DETOKENIZER

    def __init__(self, timing: FakeTiming = FakeTiming()) -> None:
        self.timing = timing

    async def warm_up(self) -> None:
        """Nothing happens only once here."""

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Speak each push as soon as its look-ahead is there; chunks given out already take no time."""
        codes = _Codes(turn.options.preset)
        index, seconds = 0, 0.0
        async for step in inbox:
            for pcm in codes.feed(step):
                mel = b"" if codes.ended else bytes(MEL_BYTES * (len(pcm) // (2 * CODE_SAMPLES)))
                speech = Speech(pcm=pcm, sample_rate=SAMPLE_RATE, mel=mel)
                chunk = Chunk(index=index, speech=speech, final=codes.ended)
                if index >= len(published):
                    speech_seconds = len(pcm) / 2 / SAMPLE_RATE
                    seconds += await _spend(self.timing.realtime_factor * speech_seconds)
                    if chunk.final:
                        chunk.report.CopyFrom(StageReport(compute_seconds=seconds, units=codes.given))
                    yield chunk
                index += 1


class _Codes:
    """Codes in, the samples of what each push commits out. Raises ParameterError for an unknown preset."""

    def __init__(self, preset: str) -> None:
        self.given = 0  # codes whose samples are out
        self.ended = False
        self._schedule = find_schedule(preset)
        self._planner = ChunkPlanner(self._schedule)
        self._left: tuple[int, ...] = ()  # the look-ahead of the last push

    def feed(self, chunk: Chunk) -> Iterator[bytes]:
        """What this step brings out: at most one push, and with the final step the rest."""
        if chunk.step.HasField("code") and (push := self._planner.feed(chunk.step.code)):
            yield self._speak(push.tokens, self._schedule.look_ahead)
        if chunk.final:
            self.ended = True
            yield self._speak(self._planner.finish().tokens, 0)

    def _speak(self, tokens: tuple[int, ...], look_ahead: int) -> bytes:
        codes = self._left + tokens
        kept = len(codes) - look_ahead
        pcm = b"".join(write_pcm(self.given + at, code) for at, code in enumerate(codes[:kept]))
        self.given, self._left = self.given + kept, codes[kept:]
        return pcm


def write_pcm(position: int, code: int) -> bytes:
    """The 1920 samples of the code at `position` of an answer: the two numbers, over and over."""
    return struct.pack("<HH", position % 32768, code) * (CODE_SAMPLES // 2)


def read_pcm(pcm: bytes) -> list[tuple[int, int]]:
    """(position, code) of all speech that FakeDetokenizer made. Raises AudioError when any sample is out of place."""
    size = 2 * CODE_SAMPLES
    pairs = [struct.unpack_from("<HH", pcm, start) for start in range(0, len(pcm) - size + 1, size)]
    found = [(position, code) for position, code in pairs]
    if b"".join(write_pcm(*pair) for pair in found) != pcm:
        raise AudioError("these samples were not made by a fake detokenizer, or some are missing")
    return found


# ---- as a process -----------------------------------------------------------------------------------------------


class FakeSettings(BaseSettings):
    """FakeTiming from the environment; the defaults are those of one busy GPU."""

    model_config = SettingsConfigDict(env_prefix="KIMIA_FAKE_", frozen=True)

    clip_seconds: float = 0.05
    prefill_seconds: float = 0.1
    step_seconds: float = 0.02
    realtime_factor: float = 0.1
    steps: int = 100

    def timing(self) -> FakeTiming:
        """The same numbers."""
        return FakeTiming(**self.model_dump())


def build(name: str, timing: FakeTiming) -> Stage:
    """The fake of a stage, by the stage's name."""
    if name == TOKENIZER.name:
        return FakeTokenizer(timing)
    return FakeLanguageModel(timing) if name == LLM.name else FakeDetokenizer(timing)


def main() -> int:
    """Run one fake stage as a process until SIGTERM; the exit code."""
    from kimia.runtime.service import run_stage
    from kimia.runtime.settings import read_settings

    parser = argparse.ArgumentParser(prog="python -m kimia.runtime.fake", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=sorted(STAGES))
    name: str = parser.parse_args().stage
    return run_stage(lambda _settings: build(name, read_settings(FakeSettings).timing()), STAGES[name])


if __name__ == "__main__":
    raise SystemExit(main())
