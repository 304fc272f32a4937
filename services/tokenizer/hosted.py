"""Both encoders on a Triton server, which gathers the segments of all turns and processes into batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from kimia.compute import ModelPlace
from kimia.errors import InternalError
from kimia.hosting import VQ, whisper_model
from kimia.model.audio import Segment
from kimia.model.config import FeatureConfig
from kimia.model.encode import EncodedAudio
from kimia.model.fingerprint import fingerprint
from kimia.model.prompt import Encoded
from kimia.pipeline import CodesOnly
from kimia.runtime.triton import TritonHost
from services.tokenizer.scheduler import Job

DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}


class HostedEncoders:
    """For one event loop at a time."""

    def __init__(self, place: ModelPlace, host: TritonHost) -> None:
        """Those of the checkpoint at `place`: its weights are looked at, not loaded."""
        self.host = host
        self.features: FeatureConfig = place.configs.vq_features
        self.samples_per_position = place.configs.samples_per_token
        self._width = place.configs.lm.adaptor_input_dim
        self._whisper = whisper_model(self._width)
        self._checkpoint = place.checkpoint
        self._dtype = torch.float32

    async def open(self) -> str:
        """Wait for the host; what its features depend on. Raises CheckpointError when it is not the right one."""
        vq, whisper, width = self._checkpoint.vq_tokenizer, self._checkpoint.whisper, str(self._width)
        await self.host.open(VQ, fingerprint([vq]))
        self._dtype = DTYPES[await self.host.open(self._whisper, fingerprint([whisper], width))]
        return fingerprint([whisper, vq], width, str(self._dtype))

    def submit(self, segments: Sequence[Segment], heard: bool) -> list[Job]:
        """Let segments of one turn be encoded; await `Job.encoded` of each, or `withdraw` them."""
        loop = asyncio.get_running_loop()
        jobs = [Job(segment, heard, 0, loop.create_future()) for segment in segments]
        for job in jobs:
            job.encoded.add_done_callback(partial(_stop, loop.create_task(self._ask(job))))
        return jobs

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more."""
        for job in jobs:
            if not job.encoded.cancel() and not job.encoded.cancelled():
                job.encoded.exception()  # seen

    async def _ask(self, job: Job) -> None:
        """The edge of the encoders: an error is raised again by who waits."""
        begin = time.perf_counter()
        try:
            encoded = await (self._both(job.segment) if job.heard else self._codes(job.segment))
        except Exception as error:  # noqa: BLE001
            if not job.encoded.done():
                job.encoded.set_exception(error)
            return
        job.seconds = time.perf_counter() - begin
        if not job.encoded.done():
            job.encoded.set_result(encoded)

    async def _codes(self, segment: Segment) -> CodesOnly:
        codes = await self.host.infer(VQ, segment.samples, np.array([segment.whole], np.uint8))
        self._check(VQ.name, len(codes), segment)
        return CodesOnly(tuple(codes.tolist()))

    async def _both(self, segment: Segment) -> Encoded:
        codes, rows = await asyncio.gather(self._codes(segment), self.host.infer(self._whisper, segment.samples))
        self._check(self._whisper.name, len(rows), segment)
        features = torch.frombuffer(bytearray(rows.tobytes()), dtype=self._dtype).reshape(rows.shape)
        return EncodedAudio(codes.codes, features)

    def _check(self, name: str, positions: int, segment: Segment) -> None:
        wanted = -(-len(segment.samples) // self.samples_per_position)
        if positions != wanted:
            rule = f"{name} gave {positions} positions for {len(segment.samples)} samples, not {wanted}"
            raise InternalError(f"{rule}; export its repository anew")


def _stop(asking: asyncio.Task[None], _: asyncio.Future[Encoded]) -> None:
    """Whoever waited has it, or waits no more."""
    asking.cancel()
