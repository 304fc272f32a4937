"""The tokenizer stage: clips in, stretches of semantic tokens and continuous features out.

A clip is encoded 30 s by 30 s, as soon as they are there (`services.tokenizer.gathering`), beside those of other turns
(`services.tokenizer.scheduler`). Features are computed only for what the model hears; spoken history needs its codes
alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing

from kimia.clips import wanted_sounds
from kimia.compute import FEATURE_TYPES, ComputeThread, cut_off, feature_bytes, open_model, own_stream, replayed
from kimia.model.encode import AudioEncoder
from kimia.model.fingerprint import fingerprint
from kimia.model.prompt import Encoded as EncodedClip
from kimia.runtime.settings import Settings
from kimia.runtime.triton import TritonHost
from kimia.stage import TOKENIZER, StageKind
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.turn_pb2 import Chunk, InputAudio, StageReport, Turn
from services.tokenizer.gathering import ClipReader, Gathering
from services.tokenizer.hosted import HostedEncoders
from services.tokenizer.scheduler import Scheduler

STRETCH = 12  # positions of a chunk, about a second


class TokenizerStage:
    """Both encoders of one checkpoint. `fingerprint` names all that the features depend on besides the sound."""

    kind: StageKind = TOKENIZER

    def __init__(self, encoder: AudioEncoder | HostedEncoders, compute: ComputeThread, fingerprint: str = "") -> None:
        self.encoder = encoder
        self.compute = compute
        self.host = encoder.host if isinstance(encoder, HostedEncoders) else None
        self.scheduler = encoder if isinstance(encoder, HostedEncoders) else Scheduler(encoder, compute)
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, settings: Settings, *, shared: bool = False) -> TokenizerStage:
        """Load the encoders of the settings' checkpoint; `shared`: other stages of this process compute there, too.

        Raises CheckpointError, ParameterError.
        """
        place = open_model(settings)
        if settings.engine:
            return cls(HostedEncoders(place, TritonHost.at(settings.engine)), ComputeThread(settings.threads))
        width = place.configs.lm.adaptor_input_dim
        encoder = AudioEncoder.load(place.checkpoint, width, place.device, place.dtype)
        folders = (place.checkpoint.whisper, place.checkpoint.vq_tokenizer)
        name = fingerprint(folders, str(width), str(place.dtype))
        stream = own_stream(place.device) if shared else None
        return cls(encoder, ComputeThread(settings.threads, stream=stream), name)

    async def warm_up(self) -> None:
        """Encode a second of silence, once the encoders' host is there. Raises CheckpointError if it has others."""
        if isinstance(self.encoder, HostedEncoders):
            self.fingerprint = await self.encoder.open()
        clip = Clip(format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000))
        turn = Turn(messages=[Message(role=ROLE_USER, audio=clip)])
        silence = Chunk(final=True, input=InputAudio(data=bytes(32000), clip_end=True))
        async for _ in self.run(turn, replayed(silence)):
            pass

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Encode every clip of the inbox; segments that were given out already are not encoded again.

        Raises AudioError, naming the message, for sound that is bad or lacking; ConversationError for a clip that no
        message has; StateError when the inbox ends too early.
        """
        if published and published[-1].final:
            return
        work = _Work(self, turn, published)
        held: Chunk | None = None  # until it is known whether the log ends with it
        index = len(published)
        async for chunk in inbox:
            async with aclosing(work.encode(chunk)) as pieces:
                async for piece in pieces:
                    if held is not None:
                        yield held
                    piece.index = index
                    held, index = piece, index + 1
            if chunk.final:
                yield work.closed(held or Chunk(index=index))
                return
            if held is not None:
                yield held
            held = None
        raise cut_off("input")


class _Work:
    """One turn in the stage."""

    def __init__(self, stage: TokenizerStage, turn: Turn, published: Sequence[Chunk]) -> None:
        features = stage.encoder.features
        self._gathering = Gathering(wanted_sounds(turn.messages), features.sample_rate, features.segment_samples)
        self._scheduler = stage.scheduler
        self._samples_per_position = stage.encoder.samples_per_position
        self._given: Counter[int] = Counter()  # positions of a clip
        self._done: Counter[int] = Counter()
        self._seconds = 0.0
        for chunk in published:
            self._given[chunk.encoded.clip] += len(chunk.encoded.codes)

    async def encode(self, chunk: Chunk) -> AsyncGenerator[Chunk, None]:
        """The stretches that a piece of sound completes and that were not given out. Raises KimiaError."""
        clip = self._gathering.take(chunk)
        if clip is not None:
            async with aclosing(self._segments(clip)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _segments(self, clip: ClipReader) -> AsyncGenerator[Chunk, None]:
        number = clip.sound.clip.number
        before = clip.seconds
        segments = await asyncio.to_thread(clip.read)
        self._seconds += clip.seconds - before
        counts = [-(-len(segment.samples) // self._samples_per_position) for segment in segments]
        while counts and self._done[number] + counts[0] <= self._given[number]:
            self._done[number] += counts.pop(0)
        jobs = self._scheduler.submit(segments[len(segments) - len(counts) :], clip.sound.heard)
        try:
            for job in jobs:
                encoded = await job.encoded
                self._seconds += job.seconds
                for piece in stretches(number, encoded, last=clip.ended and job is jobs[-1]):
                    self._done[number] += len(piece.encoded.codes)
                    if self._done[number] > self._given[number]:
                        yield piece
        finally:
            self._scheduler.withdraw(jobs)

    def closed(self, chunk: Chunk) -> Chunk:
        """The last chunk, with the report. Raises AudioError when sound is lacking."""
        self._gathering.check_complete()
        chunk.final = True
        chunk.report.CopyFrom(StageReport(compute_seconds=self._seconds, units=self._gathering.complete))
        return chunk


def stretches(number: int, encoded: EncodedClip, *, last: bool) -> Iterator[Chunk]:
    """A segment of N positions as ceil(N / STRETCH) chunks, made one by one; `last`: the clip ends with it."""
    for start in range(0, len(encoded.codes), STRETCH):
        end = start + STRETCH
        chunk = Chunk()
        piece = chunk.encoded  # filled in place: a message that is given to another one is copied with its features
        piece.clip, piece.clip_end = number, last and end >= len(encoded.codes)
        piece.codes.extend(encoded.codes[start:end])
        if encoded.features is not None:
            rows = encoded.features[start:end]
            piece.features, piece.feature_type = feature_bytes(rows), FEATURE_TYPES[rows.dtype]
            piece.feature_width = rows.shape[1]
        yield chunk
