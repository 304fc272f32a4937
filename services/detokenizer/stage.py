"""The detokenizer stage: semantic tokens in, speech out, chunk by chunk as the preset cuts it.

A chunk is synthesised as soon as its last code has come, beside those of other turns, and the sooner the sooner its
caller's buffer ends (`services.detokenizer.scheduler`). Chunk n of the log is push n of the preset. Speech is signed
16-bit at the model's rate; beside it lies the mel that the chunk committed, from which another worker can go on
(`Synthesis.restore`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from itertools import takewhile

from torch import Tensor

from kimia.compute import ComputeThread, cut_off, feature_bytes, feature_rows, open_model, own_stream, replayed
from kimia.errors import ParameterError
from kimia.model.chunking import ChunkPlanner, Push
from kimia.model.detokenize import Detokenizer, Synthesis
from kimia.model.dit import load_dit
from kimia.model.presets import find_preset
from kimia.runtime.settings import Settings
from kimia.runtime.triton import TritonHost
from kimia.sound import to_s16
from kimia.stage import DETOKENIZER, StageKind
from kimia.v1.turn_pb2 import FEATURE_TYPE_F32, Chunk, StageReport, Step, Turn
from services.detokenizer.hosted import HostedVocoder
from services.detokenizer.scheduler import Scheduler

WARM_UP_CODES = 16  # a push and a flush


class DetokenizerStage:
    """The flow model and the vocoder of one checkpoint."""

    kind: StageKind = DETOKENIZER

    def __init__(
        self,
        detokenizer: Detokenizer,
        compute: ComputeThread,
        vocoder: ComputeThread,
        host: TritonHost | None = None,
    ) -> None:
        """`compute` solves, `vocoder` makes sound of what is solved; `host` is where a HostedVocoder computes."""
        self.detokenizer = detokenizer
        self.compute = compute
        self.vocoder = vocoder
        self.host = host
        self._scheduler = Scheduler(detokenizer, compute, vocoder)

    @classmethod
    def load(cls, settings: Settings, *, shared: bool = False) -> DetokenizerStage:
        """Load the detokenizer of the settings' checkpoint; `shared`: other stages of this process compute there, too.

        Raises CheckpointError, ParameterError.
        """
        place = open_model(settings, detokenizer=True)
        flow = ComputeThread(settings.threads, stream=own_stream(place.device) if shared else None)
        if settings.engine:
            host = TritonHost.at(settings.engine)
            vocoder = HostedVocoder.of(place.checkpoint, host)
            detokenizer = Detokenizer(load_dit(place.checkpoint.flow, place.device, place.dtype), vocoder)
            waiting = ComputeThread(settings.threads, calls=settings.rows)
            return cls(detokenizer, flow, waiting, host)
        detokenizer = Detokenizer.load(place.checkpoint, place.device, place.dtype)
        return cls(detokenizer, flow, ComputeThread(settings.threads))  # the vocoder's stream is its renderer's

    async def warm_up(self) -> None:
        """Speak for a second, when the vocoder's host is there. Raises CheckpointError if it is the wrong one."""
        if isinstance(self.detokenizer.vocoder, HostedVocoder):
            await self.detokenizer.vocoder.open()
        codes = [Chunk(index=index, step=Step(code=0)) for index in range(WARM_UP_CODES)]
        codes[-1].final = True
        async for _ in self.run(Turn(), replayed(*codes)):
            pass

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Speak the codes of the inbox behind what was given out already.

        The turn is restored from the mels of the chunks given out, as far as they are there without a gap; the rest of
        these chunks is synthesised again, but not given out. The last chunk may be empty. Raises ParameterError for an
        unknown preset or an illegal code, StateError when the inbox ends too early.
        """
        if published and published[-1].final:
            return
        compute = self.compute.turn()
        codes = Codes(turn.options.preset, self.detokenizer.codes)
        synthesis = self.detokenizer.stream(codes.preset, turn.seed)
        committed = self._committed(published)
        made: list[Push] = []
        buffer = Buffer(self.detokenizer.sample_rate)
        async for chunk in inbox:
            for push in codes.feed(chunk):
                index = len(made)
                made.append(push)
                if index + 1 == len(committed):
                    await compute.run(synthesis.restore, made, committed)
                if index < len(committed):
                    continue
                pcm, seconds = await self._scheduler.push(synthesis, push, buffer.ends)
                compute.seconds += seconds
                out = self._spoken(synthesis, push, pcm)
                out.index = index
                if push.final:
                    out.final = True
                    out.report.CopyFrom(StageReport(compute_seconds=compute.seconds, units=codes.count))
                if index >= len(published):
                    buffer.give(len(pcm))
                    yield out
            if chunk.final:
                return
        raise cut_off("tokens")

    def _spoken(self, synthesis: Synthesis, push: Push, pcm: Tensor) -> Chunk:
        """What a push has given out, and the mel it committed."""
        chunk = Chunk()
        speech = chunk.speech  # filled in place: a message that is given to another one is copied with all its sound
        speech.sample_rate, speech.pcm = self.detokenizer.sample_rate, to_s16(pcm.numpy()).tobytes()
        report = synthesis.report
        if not push.final and report is not None and report.committed is not None:
            speech.mel = feature_bytes(report.committed)
        return chunk

    def _committed(self, published: Sequence[Chunk]) -> list[Tensor]:
        """The mels of the first chunks, up to the first that has none."""
        bins = self.detokenizer.dit.config.mel_bins
        mels = takewhile(bool, (chunk.speech.mel for chunk in published))
        return [feature_rows(mel, FEATURE_TYPE_F32, bins) for mel in mels]


class Buffer:
    """When a caller who plays what he gets without a pause has no more of it: at once before he got anything."""

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self.ends = time.monotonic()

    def give(self, samples: int) -> None:
        """So many more samples are there."""
        self.ends = max(self.ends, time.monotonic()) + samples / self._rate


class Codes:
    """The codes of a turn as they arrive, cut into the pushes of its preset."""

    def __init__(self, preset: str, legal: int) -> None:
        self.preset = find_preset(preset)
        self.count = 0
        self._legal = legal
        self._planner = ChunkPlanner(self.preset)

    def feed(self, chunk: Chunk) -> list[Push]:
        """The pushes that a step completes, the last one behind the final step. Raises ParameterError."""
        pushes = []
        if chunk.step.HasField("code"):
            push = self._planner.feed(self._checked(chunk.step.code))
            pushes += [push] if push else []
        if chunk.final:
            pushes.append(self._planner.finish())
        return pushes

    def _checked(self, code: int) -> int:
        if code >= self._legal:
            raise ParameterError(f"semantic token {self.count} is {code}, legal ids are 0..{self._legal - 1}")
        self.count += 1
        return code
