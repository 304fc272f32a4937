"""From logits to ids: repetition penalty, temperature, top-k, and a draw by inverse CDF.

Rows of a batch have parameters of their own. A draw is a function of the logits and one uniform number, so a turn
can be repeated anywhere. Candidates are ordered by falling logit, equal logits by rising id; the order is total, so
neither the device nor the batch decides between ties.

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
from torch import Tensor

from kimia.errors import NumericsError, ParameterError

GREEDY_TEMPERATURE = 1e-6  # up to this the best id is taken
SMALLEST_PENALTY = 1e-6
UNREASONABLE = 1e30  # numbers from here on count as infinite: float32 ends at 3e38
TEXT_WINDOW = 16  # the release's default windows
AUDIO_WINDOW = 64
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
            tracks[track] = replace(tracks[track], **{field: value})
        return cls(**tracks)


def penalise(logits: Tensor, params: Sequence[TrackSampling], histories: Sequence[Sequence[int]]) -> Tensor:
    """Logits after the repetition penalty: (B, V) -> (B, V) float32, a copy.

    Each distinct id of the last `repetition_window` ids of a row's history counts once.
    """
    penalised = logits.to(torch.float32, copy=True)
    for row, (param, history) in enumerate(zip(params, histories, strict=True)):
        window = param.repetition_window
        if param.repetition_penalty <= 1.0 or len(history) <= window:
            continue
        repeated = torch.tensor(sorted(set(history[-window:])), device=logits.device)  # [-0:] is the whole history
        chosen = penalised[row, repeated]
        penalty = param.repetition_penalty
        penalised[row, repeated] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return penalised


def distribution(logits: Tensor, params: Sequence[TrackSampling]) -> tuple[Tensor, Tensor]:
    """Candidates and their probabilities after temperature and top-k.

    logits (B, V), penalised -> ids (B, K) by falling probability and float64 probabilities (B, K), both on the CPU;
    K is the most candidates that a row has, a row's surplus has probability 0. Raises NumericsError on NaN or infinity.
    """
    counts = [param.candidates(logits.shape[-1]) for param in params]
    ids = _ordered(logits, max(counts))  # (B, K)
    values = logits.gather(-1, ids).cpu().double()
    if not torch.isfinite(values[:, 0]).all():
        raise NumericsError("the language model gave NaN or infinite logits; try bfloat16 or float32")
    surplus = torch.arange(values.shape[1]) >= torch.tensor(counts)[:, None]
    temperatures = torch.tensor([1.0 if param.greedy else param.temperature for param in params], dtype=torch.float64)
    scaled = (values - values[:, :1]) / temperatures[:, None]  # best candidate at 0: no overflow at small temperatures
    return ids.cpu(), scaled.masked_fill(surplus, -math.inf).softmax(dim=-1)


def _ordered(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits, falling; equal ones by rising id, NaN first: (B, V) -> (B, count).

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
    """One id per row by inverse CDF: the first candidate whose cumulative probability exceeds the row's number.

    logits (B, V), uniforms in [0, 1). Where rounding leaves none, the last candidate that can be drawn.
    """
    ids, probabilities = distribution(penalise(logits, params, histories), params)
    exceeds = probabilities.cumsum(dim=-1) > torch.tensor(uniforms, dtype=torch.float64)[:, None]  # (B, K)
    last = (probabilities > 0).sum(dim=-1) - 1
    place = torch.where(exceeds.any(dim=-1), exceeds.int().argmax(dim=-1), last)  # (B,)
    return ids.gather(-1, place[:, None])[:, 0].tolist()
