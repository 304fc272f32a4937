"""Solved chunks become sound beside the next evaluations of the flow, those of several turns in one call.

On CUDA the vocoder has a stream of its own, so that it fills what a solve leaves idle, and renders mels of equal length
together. On a CPU it has a thread of its own and renders one by one: there a batch rounds otherwise (by 1e-6), and
gains with short chunks only (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kimia.compute import ComputeThread
from kimia.model.detokenize import Begun, Detokenizer, Synthesis

RENDERED_AT_ONCE = {"cuda": 8, "cpu": 1}  # turns


@dataclass(eq=False)
class Rendering:
    """One solved push on its way to samples."""

    synthesis: Synthesis
    begun: Begun
    due: float  # of the monotonic clock
    frames: int  # of its mel
    heard: asyncio.Future[tuple[Tensor, float]]  # samples, and its share of the seconds computed


class Renderer:
    """Makes sound of the most urgent first. For one event loop at a time."""

    def __init__(self, detokenizer: Detokenizer, thread: ComputeThread) -> None:
        self.detokenizer = detokenizer
        self.thread = thread
        device = detokenizer.dit.device
        self._most = RENDERED_AT_ONCE[device.type]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._waiting: list[Rendering] = []
        self._lock = threading.Lock()  # of what waits: the thread may be several

    async def render(self, synthesis: Synthesis, begun: Begun, due: float) -> tuple[Tensor, float]:
        """As Synthesis.finish: samples, and the seconds computed for them."""
        loop = asyncio.get_running_loop()
        rendering = Rendering(synthesis, begun, due, synthesis.rendered_frames(begun), loop.create_future())
        with self._lock:
            self._waiting.append(rendering)
        try:
            # Each puts one call in the queue, and each call takes at least one: nobody is left behind.
            await self.thread.turn().run(self._render, loop)
            return await rendering.heard
        finally:
            with self._lock:
                self._waiting = [other for other in self._waiting if other is not rendering]

    # ---- in the vocoder's thread ----

    def _render(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            together = most_urgent_alike(self._waiting, self._most)
            self._waiting = [rendering for rendering in self._waiting if rendering not in together]
        if not together:
            return
        begin = time.perf_counter()
        try:
            samples: Sequence[Tensor | Exception] = self._sound(together)
        except Exception as error:  # noqa: BLE001 - raised again by the turns that it belongs to
            samples = [error] * len(together)
        seconds = (time.perf_counter() - begin) / len(together)
        for rendering, one in zip(together, samples, strict=True):
            loop.call_soon_threadsafe(_tell, rendering, one, seconds)

    def _sound(self, together: Sequence[Rendering]) -> list[Tensor | Exception]:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            mels = torch.stack([one.synthesis.rendered(one.begun) for one in together]).transpose(1, 2)  # (B, M, F)
            waves = self.detokenizer.vocoder(mels) if mels.shape[2] else [None] * len(together)
            samples = [_finished(rendering, wave) for rendering, wave in zip(together, waves, strict=True)]
        if self._stream:
            self._stream.synchronize()  # a turn that forgets copies its prompt, which the flow's stream reads next
        return samples


def most_urgent_alike(waiting: Sequence[Rendering], most: int) -> list[Rendering]:
    """Who is due first, and those of the same length behind it."""
    in_order = sorted(waiting, key=lambda rendering: rendering.due)
    return [rendering for rendering in in_order if rendering.frames == in_order[0].frames][:most]


def _finished(rendering: Rendering, wave: Tensor | None) -> Tensor | Exception:
    try:
        return rendering.synthesis.finish(rendering.begun, wave)
    except Exception as error:  # noqa: BLE001 - raised again by its turn
        return error


def _tell(rendering: Rendering, samples: Tensor | Exception, seconds: float) -> None:
    if rendering.heard.done():  # cancelled meanwhile
        return
    if isinstance(samples, Exception):
        rendering.heard.set_exception(samples)
    else:
        rendering.heard.set_result((samples, seconds))
