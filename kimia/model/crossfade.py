"""Joining the renderings of successive chunks into one waveform.

The vocoder sees one chunk at a time, so the end of a chunk is rendered without its future. A seam therefore holds the
end back, renders it again together with the next chunk, and fades from the old rendering to the new one.

Shapes: F mel frames, M mel bins, S samples; hop = samples per frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tail:
    """What a conversation keeps of the audio it has not given out yet."""

    mel: Tensor  # (F, M) frames rendered again before the next chunk's
    wave: Tensor  # (S,) the held-back rendering


def rendered_mel(mel: Tensor, tail: Tail | None) -> Tensor:
    """What is rendered for a chunk's mel (F, M): the tail's frames once more, and its own."""
    return mel if tail is None else torch.cat([tail.mel, mel])


class Seam(Protocol):
    """A law of joining."""

    def join(self, wave: Tensor, mel: Tensor, tail: Tail | None, final: bool) -> tuple[Tensor, Tail | None]:
        """Behind the tail, of a chunk's mel (F, M) and the rendering of `rendered_mel`: the samples to give out, and
        the next tail.
        """
        ...


@dataclass(frozen=True)
class ReleaseSeam:
    """The release's law, quirks included: Hamming halves sum to 1.08, and the last chunk is not faded.

    Half of the first chunk is held back; later chunks give out twice what was held. Non-final chunks shorter than the
    held part lose audio, so their sizes must not shrink.
    """

    def join(self, wave: Tensor, mel: Tensor, tail: Tail | None, final: bool) -> tuple[Tensor, Tail | None]:
        """As Seam.join."""
        if tail is None:
            return self._first(wave, mel, final)
        if final:
            return wave, None
        hop = wave.shape[0] // (tail.mel.shape[0] + mel.shape[0])
        held = tail.wave.shape[0]
        given = 2 * held if wave.shape[0] > 2 * held else wave.shape[0] // 2
        faded = given // 2
        window = torch.hamming_window(given, device=wave.device)
        blend = tail.wave[:faded] * window[-faded:] + wave[:faded] * window[:faded]
        rest = wave[given:]
        return torch.cat([blend, wave[faded:given]]), Tail(mel[-(rest.shape[0] // hop) :], rest)

    @staticmethod
    def _first(wave: Tensor, mel: Tensor, final: bool) -> tuple[Tensor, Tail | None]:
        if final:
            return wave, None
        half = wave.shape[0] // 2
        return wave[:half], Tail(mel[mel.shape[0] // 2 :], wave[-half:])


@dataclass(frozen=True)
class OverlapSeam:
    """A short overlap with gain 1 at every seam, the last included; no chunk size loses audio.

    `hold` frames are held back and rendered again, now with their future, behind `context` frames of their past.
    """

    hold: int
    context: int

    def join(self, wave: Tensor, mel: Tensor, tail: Tail | None, final: bool) -> tuple[Tensor, Tail | None]:
        """As Seam.join."""
        seen = rendered_mel(mel, tail)
        hop = wave.shape[0] // seen.shape[0]
        if tail is not None:
            held = tail.wave.shape[0]
            wave = cross_fade(tail.wave, wave[tail.mel.shape[0] * hop - held :])
        if final:
            return wave, None
        hold = min(self.hold, mel.shape[0])  # never a sample that is already blended
        given = wave.shape[0] - hold * hop
        return wave[:given], Tail(seen[-(self.context + hold) :], wave[given:])


def cross_fade(old: Tensor, new: Tensor) -> Tensor:
    """`new` (S,) with its beginning faded in from `old` (<= S,): sin^2 against cos^2, which sum to 1."""
    length = old.shape[0]
    phase = (torch.arange(length, device=new.device) + 0.5) / length
    rising = torch.sin(phase * (math.pi / 2)).square()
    return torch.cat([old + (new[:length] - old) * rising, new[length:]])
