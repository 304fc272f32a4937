"""The semantic tokenizer: one codebook that hears every caller and can be spoken from.

    python -m training.vq --corpus FOLDER --run FOLDER [--mel speaker|none] [--start RUN]

Three things pull on the codes: letters must be readable from them for every voice (connectionist loss at 50 Hz, behind
an up-sampling by four), the speaking voice's mel must be drawable from them (that voice only: other callers' timbre
is not worth a code), and the encoder must hear what the teacher hears. The first steps run without quantising; then
the codebook begins as k-means of the states, follows them by moving averages, and dead codes begin anew.

The released layout has no LayerNorm before the codebook, so a penalty keeps the states as one would: mean 0 and
variance 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.checkpoint import SINGLE_FILE, VQ_TOKENIZER, Stored
from kimia.model.config import FeatureConfig, FlowConfig, VQConfig
from kimia.model.vq import VQTokenizer
from kimia.model.writing import write_safetensors
from training.config import micro_configs
from training.corpus import Clip, load_clips
from training.hearing import FRAMES_PER_TOKEN, Batch, Hearing, lesson_loss, letters_loss
from training.initial import initialise
from training.loop import Loop, Plan, averaged_weights
from training.scores import CLASSES, error_rate, greedy
from training.teacher import TEACHER_WIDTH, load_teacher

KERNEL = 5  # of the head's convolutions
BLOCKS = 3
DEAD = 0.02  # a code whose averaged count is below this share of the mean begins anew


@dataclass(frozen=True)
class Weights:
    """How much each loss counts."""

    letters: float = 1.0
    lesson: float = 2.0
    mel: float = 2.0
    commit: float = 0.5
    shape: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """How the codebook is trained."""

    continuous_steps: int  # before quantising begins
    batch: int = 12
    weights: Weights = Weights()
    decay: float = 0.99  # of the codebook's moving averages
    restart_every: int = 50  # steps
    bfloat16: bool = False


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
        centres = states[torch.randperm(len(states))[: len(self.count)]].clone()
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
        self.total[dead] = states[torch.randperm(len(states))[: len(dead)]] * (mean / 4)
        return len(dead)


class VQTraining(nn.Module):
    """Everything that is trained: the tokenizer, its codebook's averages, the heads that are thrown away."""

    def __init__(self, config: VQConfig, features: FeatureConfig, flow: FlowConfig, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.tokenizer = VQTokenizer(config, features)
        self.tokenizer.to_empty(device="cpu")
        initialise(self.tokenizer)
        self.tokenizer.codebook.weight.requires_grad_(False)
        self.tokenizer.embed_positions.weight.requires_grad_(False)
        width = config.encoder.d_model
        self.book = Codebook(config.codebook_size, width, recipe.decay)
        self.head = Head(width, flow.mel_bins)
        self.pupil = nn.Linear(width, TEACHER_WIDTH)
        self.last_layer = f"out{config.quantize_position - 1}"
        self.kept: list[Tensor] = []  # states for k-means

    def encoded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (B, J, d) of the last layer, and pooled (B, K, d)."""
        states = dict(self.tokenizer.states(batch.mel, batch.samples))
        return states[self.last_layer], states["hidden"]

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The named losses of a step, weighted."""
        weights = self.recipe.weights
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            frames, hidden = self.encoded(batch)
            guessed = self.pupil(frames)
        hidden = hidden.float()
        real = batch.frames[:, ::FRAMES_PER_TOKEN]
        codes, commit = self._quantised(hidden, real, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            letters, mel = self.head(codes)
        inside = hidden[real]
        shape = inside.mean(-1).square().mean() + (inside.var(-1) - 1).square().mean()
        losses = {
            "letters": weights.letters * letters_loss(letters, batch),
            "lesson": weights.lesson * lesson_loss(guessed, batch),
            "commit": weights.commit * commit,
            "shape": weights.shape * shape,
        }
        if weights.mel:
            losses["mel"] = weights.mel * mel_loss(mel, batch)
        return losses

    def _quantised(self, hidden: Tensor, real: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Codes with the gradient passed straight through, (B, K, d), and the commitment loss."""
        inside = hidden[real].detach()
        if step < self.recipe.continuous_steps:
            self.kept = [*self.kept, inside][-60:]
            return hidden, hidden.new_zeros(())
        if not self.book.ready:
            self.book.begin(torch.cat([*self.kept, inside]))
            self.kept = []
        nearest = self.book.nearest(hidden.detach().flatten(0, 1)).view(hidden.shape[:2])
        rows = self.book.rows[nearest]
        self.book.follow(inside, nearest[real])
        if step % self.recipe.restart_every == 0:
            self.book.restart(inside)
        return hidden + (rows - hidden).detach(), F.mse_loss(hidden[real], rows[real])

    def finished(self) -> VQTokenizer:
        """The tokenizer with its codebook filled in."""
        with torch.no_grad():
            self.tokenizer.codebook.weight.copy_(self.book.rows)
        return self.tokenizer.eval()


def mel_loss(mel: Tensor, batch: Batch) -> Tensor:
    """Mean absolute error over the frames of clips that have a target; zero without any."""
    counts = batch.spoken_frames
    errors = (mel.float() - batch.spoken).abs().mean(-1)  # (B, J)
    return (errors * counts).sum() / counts.sum().clamp(min=1)


# ---- judging ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(training: VQTraining, clips: Sequence[Clip], hearing: Hearing) -> Mapping[str, Any]:
    """Character errors read from the codes alone, the speaker's mel error, and the use of the codebook.

    The codes are those that serving gives: `VQTokenizer.encode` of the whole clip.
    """
    tokenizer = training.finished()
    texts, read, mel_errors, floors, used = [], [], [], [], []
    for clip in clips:
        codes = tokenizer.encode([clip.heard()])[0]
        letters, mel = training.head(tokenizer.codebook.weight[codes][None])
        texts.append(clip.item.text)
        read.append(greedy(letters[0]))
        used.append(codes)
        target = hearing.speech_target(clip)
        if target is not None:
            mel_errors.append(float((mel[0, : len(target)] - target).abs().mean()))
            floors.append(float((target - target.mean(0)).abs().mean()))
    shares = torch.bincount(torch.cat(used), minlength=len(tokenizer.codebook.weight)).float()
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


# ---- shipping ---------------------------------------------------------------------------------------------------


def write_vq(root: Path, training: VQTraining) -> None:
    """Write the tokenizer's weights into a checkpoint folder that has its config files, in the released layout."""
    tensors = dict(training.finished().state_dict())
    positions = tensors["embed_positions.weight"].shape[0] // FRAMES_PER_TOKEN
    tensors["embed_positions2.weight"] = torch.zeros(positions, tensors["codebook.weight"].shape[1])
    tensors |= {"ema_count": training.book.count, "ema_weight": training.book.total}
    source = {
        name: Stored(tuple(value.shape), "float16", lambda value=value: value)  # type: ignore[misc]
        for name, value in tensors.items()
    }
    write_safetensors(root / VQ_TOKENIZER / SINGLE_FILE, source, {"format": "pt"})


def main() -> None:
    """Train the tokenizer, then judge it on held-out texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="run whose averaged weights to begin with")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--continuous", type=int, default=800)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--mel", type=float, default=2.0, help="weight of the speaker's mel")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--limit", type=int, help="clips to train on, of the corpus's")
    parser.add_argument("--judge-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    configs = micro_configs()
    assert configs.flow is not None
    assert configs.vocoder is not None
    recipe = Recipe(options.continuous, options.batch, Weights(mel=options.mel), bfloat16=options.bfloat16)
    training = VQTraining(configs.vq, configs.vq_features, configs.flow, recipe)
    if options.start is not None:
        averaged_weights(options.start, training)
    teacher = load_teacher()
    clips = [] if options.judge_only else load_clips(options.corpus, "train", limit=options.limit)
    hearing = Hearing(clips, teacher, configs.vq_features, configs.vocoder, configs.flow, seed=1)
    if not options.judge_only:
        plan = Plan(options.steps, options.rate, seconds=options.seconds)
        Loop(
            "vq", training, lambda step: training.losses(hearing.batch(step, recipe.batch), step), plan, options.run
        ).run()
    averaged_weights(options.run, training)
    for split, voice in (("seen", "hibari"), ("seen", None), ("unseen", None)):
        clips = load_clips(options.corpus, split, voice, limit=100)
        print(split, voice, *judge(training, clips, hearing).items(), sep="\n  ")


if __name__ == "__main__":
    main()
