"""Codes that can be heard and spoken: the codebook, the head that reads it while training, and what pulls on it.

Letters must be readable from the codes for every voice (connectionist loss at 50 Hz, behind an up-sampling by four);
the speaking voice's mel must be drawable from them (that voice only: other callers' timbre is not worth a code). The
first steps run without quantising; then the codebook begins as k-means of the states, follows them by moving averages,
and dead codes begin anew.

The released layout has no LayerNorm before the codebook, so a penalty keeps the states as one would: mean 0 and
variance 1.

Shapes: B clips, K tokens, d width, V codes, F vocoder mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.corpus import Clip
from training.hearing import FRAMES_PER_TOKEN, Batch, Hearing, letters_loss
from training.loop import device_of, fast_products
from training.scores import CLASSES, error_rate, greedy

KERNEL = 5  # of the head's convolutions
BLOCKS = 3
DEAD = 0.02  # a code whose averaged count is below this share of the mean begins anew
KEPT = 60  # batches whose states k-means sees


@dataclass(frozen=True)
class Weights:
    """How much each loss counts."""

    letters: float = 1.0
    lesson: float = 2.0
    choice: float = 1.0
    mel: float = 2.0
    commit: float = 0.5
    shape: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """How the codebook is trained."""

    continuous_steps: int  # before quantising begins
    weights: Weights = Weights()
    decay: float = 0.99  # of the codebook's moving averages
    restart_every: int = 50  # steps
    still_steps: int = 0  # before codes move: the first states of another network would drag them away


class Head(nn.Module):
    """Reads letters and the speaker's mel from codes: (B, K, d) -> (B, 4 K, CLASSES) and (B, 4 K, F). Not shipped."""

    def __init__(self, width: int, mel_bins: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(0.02 * torch.randn(FRAMES_PER_TOKEN, width))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, dilation=1) for _ in range(BLOCKS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(BLOCKS))
        self.letters = nn.Linear(width, CLASSES)
        self.mel = nn.Linear(width, mel_bins)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, d) -> letters (B, 4 K, CLASSES), mel (B, 4 K, F)."""
        x = (codes[:, :, None] + self.offset).flatten(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + F.gelu(convolution(norm(x).transpose(1, 2))).transpose(1, 2)
        return self.letters(x), self.mel(x)


class Codebook(nn.Module):
    """Nearest neighbours and their moving averages."""

    count: Tensor
    total: Tensor
    ready: Tensor

    def __init__(self, codes: int, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", torch.zeros(codes, width))
        self.register_buffer("ready", torch.zeros((), dtype=torch.long))

    @property
    def rows(self) -> Tensor:
        """The codes, (V, d)."""
        return self.total / self.count[:, None]

    @torch.no_grad()
    def begin(self, states: Tensor, rounds: int = 10) -> None:
        """k-means of states (n, d), n at least the number of codes."""
        drawn = torch.randperm(len(states))[: len(self.count)]  # on the CPU: a seed means the same everywhere
        centres = states[drawn.to(states.device)].clone()
        for _ in range(rounds):
            nearest = torch.cdist(states, centres).argmin(1)
            counts = torch.bincount(nearest, minlength=len(centres)).float()
            sums = torch.zeros_like(centres).index_add_(0, nearest, states)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        self.count.fill_(max(1.0, len(states) / len(self.count)))
        self.total.copy_(centres * self.count[:, None])
        self.ready.fill_(1)

    def nearest(self, states: Tensor) -> Tensor:
        """(n, d) -> (n,)."""
        return torch.cdist(states, self.rows).argmin(1)

    @torch.no_grad()
    def follow(self, states: Tensor, nearest: Tensor) -> None:
        """Move towards the states (n, d) that chose each code."""
        used = F.one_hot(nearest, len(self.count)).float()
        self.count.lerp_(used.sum(0), 1 - self.decay).clamp_(min=1e-3)
        self.total.lerp_(used.T @ states, 1 - self.decay)

    @torch.no_grad()
    def restart(self, states: Tensor) -> int:
        """Put dead codes where states are. How many were dead."""
        mean = float(self.count.mean())
        dead = (self.count < DEAD * mean).nonzero()[:, 0]
        dead = dead[: len(states)]
        self.count[dead] = mean / 4
        drawn = torch.randperm(len(states))[: len(dead)].to(states.device)
        self.total[dead] = states[drawn] * (mean / 4)
        return len(dead)


class CodeTraining(nn.Module):
    """The codebook's averages and the head; whoever has states trains them."""

    def __init__(self, codes: int, width: int, mel_bins: int, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.book = Codebook(codes, width, recipe.decay)
        self.head = Head(width, mel_bins)
        self.kept: list[Tensor] = []  # states for k-means

    def code_losses(self, hidden: Tensor, batch: Batch, step: int) -> dict[str, Tensor]:
        """The weighted losses of states (B, K, d), float32, and of their codes; all on one device."""
        weights = self.recipe.weights
        real = batch.frames[:, ::FRAMES_PER_TOKEN]
        codes, commit = self._quantised(hidden, real, step)
        with fast_products(device_of(self)):
            letters, mel = self.head(codes)
        inside = hidden[real]
        shape = inside.mean(-1).square().mean() + (inside.var(-1) - 1).square().mean()
        losses = {
            "letters": weights.letters * letters_loss(letters, batch),
            "commit": weights.commit * commit,
            "shape": weights.shape * shape,
        }
        return losses | ({"mel": weights.mel * mel_loss(mel, batch)} if weights.mel else {})

    def _quantised(self, hidden: Tensor, real: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Codes with the gradient passed straight through, (B, K, d), and the commitment loss."""
        inside = hidden[real].detach()
        if step < self.recipe.continuous_steps or self._knows_too_little(inside):
            self.kept = [*self.kept, inside][-KEPT:]
            return hidden, hidden.new_zeros(())
        if not self.book.ready:
            self.book.begin(torch.cat([*self.kept, inside]))
            self.kept = []
        nearest = self.book.nearest(hidden.detach().flatten(0, 1)).view(hidden.shape[:2])
        rows = self.book.rows[nearest]
        if step >= self.recipe.still_steps:
            self.book.follow(inside, nearest[real])
            if step % self.recipe.restart_every == 0:
                self.book.restart(inside)
        return hidden + (rows - hidden).detach(), F.mse_loss(hidden[real], rows[real])

    def _knows_too_little(self, inside: Tensor) -> bool:
        """A run that goes on here has kept no states of the steps before: too few, perhaps, for k-means."""
        seen = sum(map(len, self.kept)) + len(inside)
        return not self.book.ready and seen < len(self.book.count)


def mel_loss(mel: Tensor, batch: Batch) -> Tensor:
    """Mean absolute error over the frames of clips that have a target; zero without any."""
    counts = batch.spoken_frames
    errors = (mel.float() - batch.spoken).abs().mean(-1)  # (B, J)
    return (errors * counts).sum() / counts.sum().clamp(min=1)


@torch.no_grad()
def judge(
    training: CodeTraining, clips: Sequence[Clip], hearing: Hearing, codes_of: Callable[[Clip], Tensor]
) -> Mapping[str, Any]:
    """Character errors read from the codes alone, the speaker's mel error, and the use of the codebook."""
    training.eval()
    texts, read, mel_errors, floors, used = [], [], [], [], []
    for clip in clips:
        codes = codes_of(clip)
        letters, mel = training.head(training.book.rows[codes][None])
        texts.append(clip.item.text)
        read.append(greedy(letters[0]))
        used.append(codes)
        target = hearing.speech_target(clip)
        if target is not None:
            mel_errors.append(float((mel[0, : len(target)] - target).abs().mean()))
            floors.append(float((target - target.mean(0)).abs().mean()))
    shares = torch.bincount(torch.cat(used), minlength=len(training.book.count)).float()
    shares = shares / shares.sum()
    found = {
        "characters": error_rate(texts, read, words=False),
        "words": error_rate(texts, read, words=True),
        "perplexity": round(math.exp(-float((shares * (shares + 1e-9).log()).sum())), 1),
        "examples": list(zip(texts, read, strict=True))[:3],
    }
    if mel_errors:
        found |= {"mel error": sum(mel_errors) / len(mel_errors), "mel deviation": sum(floors) / len(floors)}
    return found
