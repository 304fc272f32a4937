"""From logits to ids: repetition penalty, temperature, top-k, and a draw by inverse CDF.

Rows of a batch have parameters of their own. A draw is a function of the logits and one uniform number, so a turn
can be repeated anywhere. Candidates are ordered by falling logit, equal logits by rising id; the order is total, so
neither the device nor the batch decides between ties. Nor does the batch decide anything else: what a row draws is
the same, bit by bit, in any company.

Notes
- As in the release: a penalty applies only once the history is longer than the window, penalties below 1 do nothing,
  window 0 is the whole history, temperatures up to 1e-6 mean the best id.
- Unlike it: the softmax is stable at any temperature, top_k may exceed the vocabulary, logits are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia.errors import NumericsError, ParameterError

GREEDY_TEMPERATURE = 1e-6  # up to this the best id is taken
SMALLEST_PENALTY = 1e-6
UNREASONABLE = 1e30  # numbers from here on count as infinite: float32 ends at 3e38
TEXT_WINDOW = 16  # the release's default windows
AUDIO_WINDOW = 64
LANES = 16  # float64 numbers that a CPU loop takes at a time: remainders would round otherwise
ARGUMENT_NAMES = {  # field of TrackSampling -> end of upstream's argument name
    "temperature": "temperature",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "repetition_window": "repetition_window_size",
}


@dataclass(frozen=True)
class TrackSampling:
    """How one track chooses its ids. Raises ParameterError outside the domain."""

    temperature: float = 0.0  # 0..1e-6: the best id; above: softmax(logits / temperature)
    top_k: int = 5  # candidates; 0 or less: the whole vocabulary
    repetition_penalty: float = 1.0  # repeated ids' logits are divided by it (multiplied when negative)
    repetition_window: int = TEXT_WINDOW  # last ids of the track that count as repeated; 0: all

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, (int, float), minimum=0.0)
        _check("top_k", self.top_k, (int,))
        _check("repetition_penalty", self.repetition_penalty, (int, float), minimum=SMALLEST_PENALTY)
        _check("repetition_window", self.repetition_window, (int,), minimum=0)

    @property
    def greedy(self) -> bool:
        """Whether the best id is taken and no uniform number is used."""
        return self.temperature <= GREEDY_TEMPERATURE

    def candidates(self, vocabulary: int) -> int:
        """How many ids can be drawn."""
        if self.greedy:
            return 1
        return min(self.top_k, vocabulary) if self.top_k > 0 else vocabulary


def _check(name: str, value: float, kinds: tuple[type, ...], minimum: float = -math.inf) -> None:
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not abs(value) < UNREASONABLE or value < minimum:
        kind = "a finite number" if float in kinds else "an integer"
        bound = "" if minimum == -math.inf else f" of at least {minimum}"
        raise ParameterError(f"{name} must be {kind}{bound}, got {value!r}")


@dataclass(frozen=True)
class Sampling:
    """How both tracks choose their ids."""

    text: TrackSampling = TrackSampling(repetition_window=TEXT_WINDOW)
    audio: TrackSampling = TrackSampling(repetition_window=AUDIO_WINDOW)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, float]) -> Sampling:
        """From upstream's argument names (`audio_temperature`, `text_repetition_window_size`, ...), its defaults else.

        Raises ParameterError for a name that does not exist or a value outside its domain.
        """
        tracks = {track.name: getattr(cls(), track.name) for track in fields(cls)}
        names = {f"{track}_{end}": (track, field) for track in tracks for field, end in ARGUMENT_NAMES.items()}
        for name, value in arguments.items():
            if name not in names:
                raise ParameterError(f"unknown sampling parameter {name!r}; there are {', '.join(sorted(names))}")
            track, field = names[name]
            try:
                tracks[track] = replace(tracks[track], **{field: value})
            except ParameterError as error:
                raise ParameterError(name + str(error).removeprefix(field)) from error
        return cls(**tracks)


def penalise(logits: Tensor, params: Sequence[TrackSampling], histories: Sequence[Sequence[int]]) -> Tensor:
    """Logits after the repetition penalty: (B, V) -> (B, V) float32; the given ones are left as they are.

    Each distinct id of the last `repetition_window` ids of a row's history counts once.
    """
    rows = [row for row, (param, history) in enumerate(zip(params, histories, strict=True)) if _bites(param, history)]
    if not rows:
        return logits.float()
    windows = [histories[row][-params[row].repetition_window :] for row in rows]  # [-0:] is the whole history
    longest = max(map(len, windows))
    filled = [[*window, *[window[-1]] * (longest - len(window))] for window in windows]
    penalised = logits.to(torch.float32, copy=True)
    where = torch.tensor(rows, device=logits.device)[:, None], torch.tensor(filled, device=logits.device)
    chosen = penalised[where]
    penalty = chosen.new_tensor([params[row].repetition_penalty for row in rows])[:, None]
    penalised[where] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)  # an id twice: the same value twice
    return penalised


def _bites(param: TrackSampling, history: Sequence[int]) -> bool:
    return param.repetition_penalty > 1.0 and len(history) > param.repetition_window


@dataclass(frozen=True)
class Candidates:
    """The ids that can be drawn, by falling weight, on the CPU. Columns are padded with weights of 0."""

    ids: Tensor  # (B, K)
    weights: Tensor  # (B, K') float64, K' >= K; the best one is 1
    numbers: Tensor  # (B,) whether the row's logits are numbers; else its weights mean nothing


def _candidates(logits: Tensor, params: Sequence[TrackSampling]) -> Candidates:
    """Penalised logits (B, V) after temperature and top-k. A row's weights do not depend on the other rows."""
    counts = [param.candidates(logits.shape[-1]) for param in params]
    ids = _ordered(logits, max(counts))
    values = logits.gather(-1, ids).cpu().double()
    numbers = torch.isfinite(values[:, 0])
    surplus = torch.arange(values.shape[1]) >= torch.tensor(counts)[:, None]
    temperatures = torch.tensor([1.0 if param.greedy else param.temperature for param in params], dtype=torch.float64)
    scaled = (values - values[:, :1]) / temperatures[:, None]  # best candidate at 0: no overflow at small temperatures
    scaled = F.pad(scaled.masked_fill(surplus, -math.inf), (0, -values.shape[1] % LANES), value=-math.inf)
    return Candidates(ids.cpu(), scaled.exp(), numbers)


def distribution(logits: Tensor, params: Sequence[TrackSampling]) -> tuple[Tensor, Tensor]:
    """Candidates and their probabilities after temperature and top-k.

    logits (B, V), penalised -> ids (B, K) by falling probability and float64 probabilities (B, K), both on the CPU;
    K is the most candidates that a row has, a row's surplus has probability 0. Raises NumericsError on NaN or infinity.
    """
    found = _candidates(logits, params)
    if not found.numbers.all():
        raise no_numbers()
    weights = found.weights[:, : found.ids.shape[1]]
    return found.ids, weights / weights.sum(dim=-1, keepdim=True)


def _ordered(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits, falling; equal ones by rising id, NaN first: (B, V) -> (B, count)."""
    if count == 1:
        return logits.argmax(dim=-1, keepdim=True)  # the first of equal ones, NaN before all
    if count < logits.shape[-1]:
        values, ids = logits.topk(count + 1, dim=-1)
        if (values[:, count - 1] > values[:, count]).all():  # which ids is clear, only equal ones are out of order
            ids = ids[:, :count].sort(dim=-1).values
            order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
            return ids.gather(-1, order)
    return ordered_by_bits(logits, count)


def ordered_by_bits(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of (..., V), as `_ordered`, where equal logits or NaN lie across the border.

    Sorts integers made of the float's bits (order-preserving) and, below them, the id: no two are equal.
    """
    clean = logits.float().masked_fill(logits.isnan(), math.inf) + 0.0  # -0.0 + 0.0 = 0.0
    bits = clean.view(torch.int32).long()
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((rising << 32) | (0xFFFFFFFF - ids)).topk(count, dim=-1).indices


def choose(
    logits: Tensor, params: Sequence[TrackSampling], histories: Sequence[Sequence[int]], uniforms: Sequence[float]
) -> list[int]:
    """One id per row by inverse CDF: the first candidate whose share of the sum, with those before it, exceeds the
    row's number in [0, 1). Where rounding leaves none, the last candidate that can be drawn.

    logits (B, V). Raises NumericsError where a row's logits are NaN or infinite.
    """
    found = _candidates(penalise(logits, params, histories), params)
    if not found.numbers.all():
        raise no_numbers()
    sums = found.weights.cumsum(dim=-1)  # (B, K')
    exceeds = sums > torch.tensor(uniforms, dtype=torch.float64)[:, None] * sums[:, -1:]
    last = (found.weights > 0).sum(dim=-1) - 1
    place = torch.where(exceeds.any(dim=-1), exceeds.int().argmax(dim=-1), last).clamp(min=0)  # (B,)
    drawn: list[int] = found.ids.gather(-1, place[:, None])[:, 0].tolist()
    return drawn


def no_numbers() -> NumericsError:
    """What is raised for logits that are NaN or infinite."""
    return NumericsError("the language model gave NaN or infinite logits; try bfloat16 or float32")
