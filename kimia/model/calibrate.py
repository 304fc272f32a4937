"""Which time grid, look-ahead and chunk sizes are enough: candidates measured on one's own weights and codes.

All candidates speak the same codes from the same noise, which here belongs to the mel frame, not to the chunk, so that
what differs is the candidate. A candidate's distance is that of its mels to those of thirty evenly spaced points (29
steps, as the release solves), in dB: the log-spectral distance, the root of the mean square over the mel bins,
averaged over frames. Below 1 dB two spectra are taken to sound alike (Paliwal and Atal, 1993, on spectral envelopes).

1. The grid, with the cuts of `low-latency`: few steps, evenly spaced or closer together at one end ("sway sampling",
   F5-TTS, arXiv 2410.06885), against 29 even steps with the same cuts. The cheapest within the limit is taken.
2. Look-ahead and chunk sizes, with that grid, against the release's cuts in 29 even steps. The cheapest is taken that
   is no farther from them than the cuts of `low-latency`, and does not let the first sound wait longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kimia.errors import ParameterError
from kimia.model import philox
from kimia.model.chunking import pushes
from kimia.model.cost import flow_second
from kimia.model.detokenize import Detokenizer, Noise
from kimia.model.preset_file import FRAMES_PER_TOKEN, PresetFile
from kimia.model.presets import LOW_LATENCY, UPSTREAM, Preset, preset_of
from kimia.model.schedule import Schedule

DECIBELS = 20 / math.log(10)  # of a natural logarithm of magnitudes
LARGEST_SWAY = 2 / (math.pi - 2)  # beyond it times would run backwards
FEWEST_STEPS, MOST_STEPS = 2, 100
TIME_DIGITS = 6

Part = Literal["grid", "cuts"]


@dataclass(frozen=True)
class Space:
    """What is tried. Raises ParameterError for values outside their domains."""

    steps: tuple[int, ...] = (6, 8, 10, 12, 16, 20)
    sways: tuple[float, ...] = (0.0, -0.5, -1.0, 0.5)  # below 0: closer together at the beginning, at the noise
    look_aheads: tuple[int, ...] = (2, 4, 8)
    growths: tuple[tuple[int, ...], ...] = ((6, 12, 24, 37), (6, 18, 37), (6, 12, 24, 48))  # tokens that pushes commit
    limit: float = 1.0  # dB that a grid may differ by

    def __post_init__(self) -> None:
        if not (self.steps and self.sways and self.look_aheads and self.growths):
            raise ParameterError("a calibration needs at least one value of everything that is tried")
        if min(self.steps) < FEWEST_STEPS or max(self.steps) > MOST_STEPS:
            raise ParameterError(f"steps must lie in {FEWEST_STEPS}..{MOST_STEPS}, got {list(self.steps)}")
        if min(self.sways) < -1 or max(self.sways) > LARGEST_SWAY:
            raise ParameterError(f"a spacing must lie in -1..{LARGEST_SWAY:.2f}, got {list(self.sways)}")
        if not self.limit >= 0:
            raise ParameterError(f"the limit is a distance in dB, got {self.limit}")


@dataclass(frozen=True)
class Measured:
    """One candidate."""

    part: Part
    file: PresetFile
    sway: float
    distance: float  # dB to the reference of its part
    tflop: float  # per second of audio, at this model's size

    @property
    def steps(self) -> int:
        """Evaluations of the velocity field."""
        return len(self.file.times) - 1

    @property
    def first_codes(self) -> int:
        """Codes before the first sound."""
        return self.file.schedule.push_size(0)


def sway_times(steps: int, sway: float) -> tuple[float, ...]:
    """The points of so many steps from 0 to 1."""
    even = np.linspace(0, 1, steps + 1)
    times = even + sway * (np.cos(np.pi / 2 * even) - 1 + even)
    return (0.0, *(round(float(time), TIME_DIGITS) for time in times[1:-1]), 1.0)


def own_preset(name: str, commits: tuple[int, ...], look_ahead: int, times: tuple[float, ...]) -> PresetFile:
    """A preset with the seams and the window of `low-latency`. Raises ParameterError."""
    seam = LOW_LATENCY.seam
    schedule = Schedule(name, commits, look_ahead, waits_for_next=False, held=LOW_LATENCY.held)
    return PresetFile(schedule, seam.hold, seam.context, LOW_LATENCY.kv_window, times)  # type: ignore[attr-defined]


class Calibration:
    """The search, on the codes of some clips."""

    def __init__(self, detokenizer: Detokenizer, clips: Sequence[Sequence[int]], space: Space, name: str) -> None:
        """Raises ParameterError when there is nothing to speak or an option is outside its domain."""
        if not any(clips):
            raise ParameterError("nothing to calibrate on: the audio gives no codes")
        self.space = space
        self.name = name
        self._detokenizer = detokenizer
        self._clips = [clip for clip in clips if clip]
        self._grids = [(sway, sway_times(steps, sway)) for steps in sorted(space.steps) for sway in space.sways]
        cuts = [(growth, ahead) for growth in space.growths for ahead in space.look_aheads]
        self._cuts = [cut for cut in cuts if cut != (LOW_LATENCY.commits, LOW_LATENCY.look_ahead)]  # measured anyway
        for growth, ahead in self._cuts:  # refused before anything is computed
            own_preset(name, growth, ahead, self._grids[0][1])

    @property
    def runs(self) -> int:
        """Times that all clips are spoken."""
        return 2 + len(self._grids) + 1 + len(self._cuts)

    @property
    def sample_rate(self) -> int:
        """Of what is spoken, Hz."""
        return self._detokenizer.sample_rate

    def search(self) -> Iterator[Measured | None]:
        """Every run as it ends: a candidate, or None for a reference. The last `Measured` is the one to take."""
        reference = self._mels(LOW_LATENCY)
        yield None
        grids = []
        for sway, times in self._grids:
            file = own_preset(self.name, LOW_LATENCY.commits, LOW_LATENCY.look_ahead, times)
            grids.append(self._measured("grid", file, sway, reference))
            yield grids[-1]
        grid = best_grid(grids, self.space.limit)
        reference = self._mels(UPSTREAM)
        yield None
        own = self._measured("cuts", grid.file, grid.sway, reference)
        yield own
        cuts = [own]
        for growth, ahead in self._cuts:
            file = own_preset(self.name, growth, ahead, grid.file.times)
            cuts.append(self._measured("cuts", file, grid.sway, reference))
            yield cuts[-1]
        yield best_cuts(cuts)

    def speak(self, preset: Preset) -> list[Tensor]:
        """The clips as waveforms (S,), for who wants to hear or transcribe them."""
        return [
            self._detokenizer.synthesize(clip, preset, 0, self._noise(index, clip, preset))
            for index, clip in enumerate(self._clips)
        ]

    def _measured(self, part: Part, file: PresetFile, sway: float, reference: Sequence[Tensor]) -> Measured:
        preset = preset_of(file)
        frames = [spectral_distances(*pair) for pair in zip(self._mels(preset), reference, strict=True)]
        tflop = flow_second(self._detokenizer.dit.config, preset, 1).flop / 1e12
        return Measured(part, file, sway, float(torch.cat(frames).mean()), tflop)

    def _mels(self, preset: Preset) -> list[Tensor]:
        return [
            spoken_mel(self._detokenizer, clip, preset, self._noise(index, clip, preset))
            for index, clip in enumerate(self._clips)
        ]

    def _noise(self, clip: int, codes: Sequence[int], preset: Preset) -> Noise:
        bins = self._detokenizer.dit.config.mel_bins
        whole = torch.from_numpy(philox.normal(0, clip, (len(codes) * FRAMES_PER_TOKEN, bins)))

        def noise(chunk: int, shape: tuple[int, int]) -> Tensor:
            start = FRAMES_PER_TOKEN * sum(preset.commit(index) for index in range(chunk))
            return whole[start : start + shape[0]]

        return noise


def best_grid(grids: Sequence[Measured], limit: float) -> Measured:
    """The fewest steps within the limit, of these the nearest; the nearest of all where none is within."""
    within = [grid for grid in grids if grid.distance <= limit]
    return min(within, key=lambda grid: (grid.tflop, grid.distance)) if within else min(grids, key=lambda g: g.distance)


def best_cuts(cuts: Sequence[Measured]) -> Measured:
    """The cheapest that is neither farther from the reference nor later with its first sound than the first."""
    own = cuts[0]
    fine = [cut for cut in cuts if cut.distance <= own.distance and cut.first_codes <= own.first_codes]
    return min(fine, key=lambda cut: (cut.tflop, cut.distance))


@torch.inference_mode()
def spoken_mel(detokenizer: Detokenizer, codes: Sequence[int], preset: Preset, noise: Noise) -> Tensor:
    """All mel frames of a turn (T, M), without a call of the vocoder."""
    synthesis, mels = detokenizer.stream(preset, 0, noise), []
    for push in pushes(preset, codes):
        begun = synthesis.begin(push.tokens, push.final)
        if begun.solving is not None:
            detokenizer.engine.solve(begun.solving)
        rendered = synthesis.rendered(begun)
        synthesis.finish(begun, rendered.new_zeros(len(rendered) * detokenizer.vocoder.config.hop))
        if begun.solving is not None and synthesis.report is not None:
            mels.append(synthesis.report.mel)
    return torch.cat(mels)


def spectral_distances(one: Tensor, other: Tensor) -> Tensor:
    """Log-spectral distance of each frame in dB, of natural log-mels (T, M) -> (T,)."""
    return DECIBELS * (one - other).square().mean(1).sqrt()


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """(substitutions, insertions and deletions; words said), letters and digits alone counting."""
    one, other = _words(said), _words(heard)
    row = list(range(len(other) + 1))
    for index, word in enumerate(one, 1):
        above, row[0] = row[0], index
        for column, found in enumerate(other, 1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (word != found))
    return row[-1], len(one)


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
