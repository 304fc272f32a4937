"""The ids of many turns and both tracks in one pass: the fast twin of `kimia.model.sampler.choose`.

    recent = Recent(sampling)                   # of a turn and a track; every id of the track is told to it
    draws = Draws([[sampling, ...], ...], V)    # tracks x rows; made again when the rows change
    ids = draws.draw(logits, [[recent, ...], ...], numbers)

What a row draws is what `choose` draws, in any company. Penalties and the choice of candidates are operations on all
rows; the few candidates then leave the device, in one transfer, and are weighed in plain numbers, which for so few is
faster than a dozen operations.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import exp, isfinite

import numpy as np
import torch
from torch import Tensor

from kimia.errors import NumericsError
from kimia.model.sampler import TrackSampling, choose

FEW = 64  # candidates; a row with more of them is left to `choose`
FIRST_ROOM = 64  # ids, where the window is the whole history


class Recent:
    """The last ids of one track, as many as its penalty looks at. In no order: a penalty asks for none."""

    def __init__(self, sampling: TrackSampling) -> None:
        self._window = sampling.repetition_window
        self._ids = np.zeros(self._window or FIRST_ROOM, dtype=np.int64)
        self._count = 0

    def add(self, token: int) -> None:
        """One more id of the track."""
        if self._window == 0 and self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self._count % len(self._ids)] = token
        self._count += 1

    def ids(self) -> np.ndarray | None:
        """What counts as repeated, or None as long as the track is no longer than its window."""
        if self._count <= self._window:
            return None
        return self._ids if self._window else self._ids[: self._count]


class Draws:
    """How a given set of rows draws: all that stays the same from step to step."""

    def __init__(self, params: Sequence[Sequence[TrackSampling]], vocabulary: int) -> None:
        """`params` of each track, of each row."""
        self._params = params
        counts = {param.candidates(vocabulary) for track in params for param in track}
        most = max((count for count in counts if count <= FEW), default=1)
        self._asked = min(most + 1, vocabulary)  # one more, to see whether its logit equals the last one's
        self._vocabulary = vocabulary
        self._lengths: list[tuple[tuple[int, int, float], int]] = []  # of what was repeated at the last step
        self._rows = np.empty(0, dtype=np.int64)
        self._penalty = torch.empty(0)
        self._penalties = [
            (track, row, param.repetition_penalty)
            for track, rows in enumerate(params)
            for row, param in enumerate(rows)
            if param.repetition_penalty > 1.0
        ]

    def draw(
        self, logits: Tensor, recent: Sequence[Sequence[Recent]], numbers: Sequence[Sequence[float]]
    ) -> list[list[int | None]]:
        """Per track and row an id, or None where the logits are NaN or infinite.

        logits (tracks, rows, V), which may be overwritten; `numbers` in [0, 1) as for `choose`.
        """
        logits = logits.float()
        self._penalise(logits, recent)
        found = torch.cat([part.double() for part in logits.topk(self._asked, dim=-1)], dim=-1).tolist()
        drawn: list[list[int | None]] = []
        for track, rows in enumerate(found):
            drawn.append([])
            for row, candidates in enumerate(rows):
                param, number = self._params[track][row], numbers[track][row]
                values, ids = candidates[: self._asked], candidates[self._asked :]
                token = self._pick(values, ids, param, number)
                drawn[-1].append(_plainly(logits[track, row], param, number) if token is None else token)
        return drawn

    def _penalise(self, logits: Tensor, recent: Sequence[Sequence[Recent]]) -> None:
        """`penalise` in place: an id twice gets the same value twice."""
        found = [(each, ids) for each in self._penalties if (ids := recent[each[0]][each[1]].ids()) is not None]
        if not found:
            return
        steps = of_track, of_row, of_id = logits.stride()
        lengths = [(each, len(ids)) for each, ids in found]
        if self._lengths != lengths:
            counts = [count for _, count in lengths]
            rows = [track * of_track + row * of_row for (track, row, _), _ in lengths]
            penalties = [penalty for (_, _, penalty), _ in lengths]
            self._lengths, self._rows = lengths, np.repeat(rows, counts)
            self._penalty = torch.from_numpy(np.repeat(penalties, counts)).to(logits)
        places = np.concatenate([ids for _, ids in found]) * of_id + self._rows
        where = torch.from_numpy(places).to(logits.device)
        extent = 1 + sum((count - 1) * step for count, step in zip(logits.shape, steps, strict=True))
        flat = logits.as_strided((extent,), (1,))
        chosen = flat.index_select(0, where)
        flat.index_copy_(0, where, torch.minimum(chosen * self._penalty, chosen / self._penalty))  # penalties exceed 1

    def _pick(self, values: list[float], ids: list[float], param: TrackSampling, number: float) -> int | None:
        """One row's id; None where these candidates do not decide it."""
        count = param.candidates(self._vocabulary)
        best = values[0]
        if count > FEW or not isfinite(best) or (count < len(values) and values[count] == values[count - 1]):
            return None
        if count == 1:
            return int(ids[0])
        if len(set(values[:count])) < count:
            pairs = sorted(zip(values[:count], ids, strict=False), key=lambda pair: (-pair[0], pair[1]))
            values, ids = [value for value, _ in pairs], [token for _, token in pairs]
        sums = list(accumulate([exp((value - best) / param.temperature) for value in values[:count]]))
        place = bisect_right(sums, number * sums[-1])
        return int(ids[place if place < count else bisect_left(sums, sums[-1])])


def _plainly(logits: Tensor, param: TrackSampling, number: float) -> int | None:
    """What `choose` draws from penalised logits (V,); None where they are NaN or infinite."""
    try:
        return choose(logits[None], [replace(param, repetition_penalty=1.0)], [[]], [number])[0]
    except NumericsError:
        return None
