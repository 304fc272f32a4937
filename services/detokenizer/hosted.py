"""The vocoder on a Triton server: for `Synthesis` it is a vocoder like any other."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from kimia.errors import StateError
from kimia.hosting import vocoder_model
from kimia.model.checkpoint import Checkpoint
from kimia.model.config import VocoderConfig
from kimia.model.fingerprint import fingerprint
from kimia.runtime.triton import TritonHost


class HostedVocoder:
    """Called in any thread but that of the event loop, in which it was opened."""

    def __init__(self, config: VocoderConfig, weights: str, host: TritonHost) -> None:
        """`weights`: the fingerprint that the host must show."""
        self.config = config
        self._weights = weights
        self._host = host
        self._model = vocoder_model(config.mel_bins)
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, host: TritonHost) -> HostedVocoder:
        """That of a checkpoint; its weights are looked at, not loaded. Raises CheckpointError."""
        config = VocoderConfig.read(checkpoint.vocoder / "config.json")
        return cls(config, fingerprint([checkpoint.vocoder]), host)

    async def open(self) -> None:
        """Wait for the host. Raises CheckpointError when it is not the right one."""
        await self._host.open(self._model, self._weights)
        self._loop = asyncio.get_running_loop()

    def __call__(self, mel: Tensor) -> Tensor:
        """(B, M, F) -> (B, hop * F), as `kimia.model.bigvgan.BigVGAN`. Raises UnavailableError, InternalError."""
        if self._loop is None:
            raise StateError("the vocoder's host is not open; wait for the stage to warm up")
        asked = [
            asyncio.run_coroutine_threadsafe(self._host.infer(self._model, row), self._loop)
            for row in mel.float().cpu().numpy()
        ]
        waves = [torch.tensor(one.result()) for one in asked]
        return torch.stack(waves).to(mel.device)
