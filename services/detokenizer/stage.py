"""The detokenizer stage: semantic tokens in, speech out, chunk by chunk as the preset cuts it.

A chunk is synthesised as soon as its last code has come, one at a time, so the turns of a process interleave chunk by
chunk. Speech is signed 16-bit at the model's rate.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from kimia.compute import ComputeThread, cut_off, open_model, replayed
from kimia.errors import ParameterError
from kimia.model.chunking import ChunkPlanner, Push
from kimia.model.detokenize import Detokenizer
from kimia.model.presets import LOW_LATENCY, find_preset
from kimia.runtime.settings import Settings
from kimia.sound import to_s16
from kimia.stage import DETOKENIZER, StageKind
from kimia.v1.turn_pb2 import Chunk, Speech, StageReport, Step, Turn

WARM_UP_CODES = 16  # a push and a flush


class DetokenizerStage:
    """The flow model and the vocoder of one checkpoint."""

    kind: StageKind = DETOKENIZER

    def __init__(self, detokenizer: Detokenizer, compute: ComputeThread) -> None:
        self.detokenizer = detokenizer
        self.compute = compute

    @classmethod
    def load(cls, settings: Settings) -> DetokenizerStage:
        """Load the detokenizer of the settings' checkpoint. Raises CheckpointError, ParameterError."""
        place = open_model(settings, detokenizer=True)
        return cls(Detokenizer.load(place.checkpoint, place.device, place.dtype), ComputeThread(settings.threads))

    async def warm_up(self) -> None:
        """Speak for a second."""
        codes = [Chunk(index=index, step=Step(code=0)) for index in range(WARM_UP_CODES)]
        codes[-1].final = True
        async for _ in self.run(Turn(), replayed(*codes)):
            pass

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Speak the codes of the inbox; what was given out already is synthesised again, but not given out.

        The last chunk may be empty. Raises ParameterError for an unknown preset or an illegal code, StateError when
        the inbox ends too early.
        """
        if published and published[-1].final:
            return
        compute = self.compute.turn()
        codes = Codes(turn.options.preset, self.detokenizer.codes)
        synthesis = self.detokenizer.stream(codes.preset, turn.seed)
        index = 0
        async for chunk in inbox:
            for push in codes.feed(chunk):
                pcm = to_s16((await compute.run(synthesis.push, push.tokens, push.final)).numpy()).tobytes()
                if not (pcm or push.final):
                    continue
                out = Chunk(index=index, speech=Speech(pcm=pcm, sample_rate=self.detokenizer.sample_rate))
                if push.final:
                    out.final = True
                    out.report.CopyFrom(StageReport(compute_seconds=compute.seconds, units=codes.count))
                if index >= len(published):
                    yield out
                index += 1
            if chunk.final:
                return
        raise cut_off("tokens")


class Codes:
    """The codes of a turn as they arrive, cut into the pushes of its preset."""

    def __init__(self, preset: str, legal: int) -> None:
        self.preset = find_preset(preset or LOW_LATENCY.name)
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
