"""What both encoders learn from: batches of augmented clips with letters, the teacher's states, and mel targets.

The teacher hears each clean clip once. Its states are stretched to the augmented clip's pace, so a pupil learns to hear
the same thing whoever says it, however fast, and through whatever line.

Shapes: B clips, M mel bins, T mel frames, J = T / 2 encoder frames (50 Hz), D the teacher's width, F vocoder mel bins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kimia.model.audio import LogMel
from kimia.model.bigvgan import mel_spectrogram
from kimia.model.config import FeatureConfig, FlowConfig, VocoderConfig
from training.augment import GENTLE, Chances, augmented
from training.corpus import Clip
from training.scores import BLANK, letter_ids
from training.teacher import TEACHER_WIDTH, Teacher
from training.voices import SPEAKER

TOKEN_SAMPLES = 1280  # at the hearing rate
FRAME_SAMPLES = 320
FRAMES_PER_TOKEN = TOKEN_SAMPLES // FRAME_SAMPLES
NEIGHBOURS = 96  # clips of like length that a batch is drawn from
TAUGHT_EVERY = 10  # clips, of which the teacher hears one: it costs as much as a pupil's whole step
SPEAKER_GENTLE = 0.75  # share of the speaker's clips that keep pitch and pace, and so have a mel target


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's clips, padded to the longest."""

    mel: Tensor  # (B, M, T)
    samples: Tensor  # (B,) samples of each clip
    letters: Tensor  # (all letters,) of all clips, end to end
    letter_counts: Tensor  # (B,)
    taught: Tensor  # (B, J, D) the teacher's states, zero behind a clip and where there are none
    has_taught: Tensor  # (B,) 1.0 where `taught` counts
    spoken: Tensor  # (B, J, F) normalised mel of clean speech, zero where there is none
    has_spoken: Tensor  # (B,) 1.0 where `spoken` counts

    @property
    def frames(self) -> Tensor:
        """(B, J) true for the frames of a clip."""
        starts = torch.arange(self.taught.shape[1]) * FRAME_SAMPLES
        return starts < self.samples[:, None]


class Hearing:
    """Batches from clips."""

    def __init__(
        self, clips: Sequence[Clip], teacher: Teacher | None, features: FeatureConfig, vocoder: VocoderConfig,
        flow: FlowConfig, seed: int,
    ) -> None:  # fmt: skip
        self.clips = sorted(clips, key=lambda clip: clip.tokens)
        self.teacher, self.vocoder, self.flow, self.seed = teacher, vocoder, flow, seed
        self.segment = features.segment_samples
        self.log_mel = LogMel(features)
        self._taught: dict[int, Tensor] = {}  # (J, D) float16 by clip
        self._spoken: dict[int, Tensor] = {}

    def batch(self, step: int, size: int, chances: Chances = Chances()) -> Batch:  # noqa: B008 (frozen)
        """The batch of a step: the same in every run."""
        rng = random.Random(f"{self.seed}/{step}")
        start = rng.randrange(max(1, len(self.clips) - NEIGHBOURS))
        chosen = rng.sample(range(start, min(start + NEIGHBOURS, len(self.clips))), size)
        noise = np.random.default_rng([self.seed, step])
        return self._stacked([self._changed(index, rng, noise, chances) for index in chosen])

    def _changed(
        self, index: int, rng: random.Random, noise: np.random.Generator, chances: Chances
    ) -> tuple[int, np.ndarray, float]:
        keep = self.clips[index].item.voice == SPEAKER.name and rng.random() < SPEAKER_GENTLE
        changed = augmented(noise, self.clips[index].heard(), GENTLE if keep else chances)
        return index, changed.wave[: self.segment], changed.pace

    def _stacked(self, rows: list[tuple[int, np.ndarray, float]]) -> Batch:
        longest = max(-(-len(wave) // TOKEN_SAMPLES) for _, wave, _ in rows) * TOKEN_SAMPLES
        frames = longest // FRAME_SAMPLES
        # Each clip's own padding, as the tokenizer pads it, then zeros
        mels = [self.log_mel(wave, -(-len(wave) // TOKEN_SAMPLES) * TOKEN_SAMPLES) for _, wave, _ in rows]
        mel = torch.stack([F.pad(torch.from_numpy(one), (0, 2 * frames - one.shape[1])) for one in mels])
        letters = [letter_ids(self.clips[index].item.text) for index, _, _ in rows]
        spoken = [self._target(index, len(wave)) if pace == 1.0 else None for index, wave, pace in rows]
        taught = [self._lesson(index, len(wave), pace) for index, wave, pace in rows]
        return Batch(
            mel=mel,
            samples=torch.tensor([len(wave) for _, wave, _ in rows]),
            letters=torch.tensor([letter for row in letters for letter in row]),
            letter_counts=torch.tensor([len(row) for row in letters]),
            taught=_stacked(taught, frames, TEACHER_WIDTH),
            has_taught=_present(taught),
            spoken=_stacked(spoken, frames, self.flow.mel_bins),
            has_spoken=_present(spoken),
        )

    # ---- targets ----

    def _lesson(self, index: int, samples: int, pace: float) -> Tensor | None:
        """The teacher's states at the pace of the changed clip, (J, D); None for clips that it does not hear."""
        if self.teacher is None or index % TAUGHT_EVERY:
            return None
        if index not in self._taught:
            self._taught[index] = self.teacher.hear(self.clips[index].heard()[: self.segment]).half()
        states = self._taught[index].float()
        frames = -(-samples // FRAME_SAMPLES)
        if pace == 1.0:
            return states[:frames]
        return F.interpolate(states.T[None], size=frames, mode="linear", align_corners=False)[0].T

    def _target(self, index: int, samples: int) -> Tensor | None:
        """The speaker's clean mel, normalised as the flow model's, (J, F); None for all other voices."""
        if index not in self._spoken:
            target = self.speech_target(self.clips[index])
            if target is None:
                return None
            self._spoken[index] = target.half()
        return self._spoken[index].float()[: -(-samples // FRAME_SAMPLES)]

    def speech_target(self, clip: Clip) -> Tensor | None:
        """What the speaking voice's clip should sound like, (J, F) normalised; None for all other voices."""
        if clip.item.voice != SPEAKER.name:
            return None
        mel = mel_spectrogram(torch.from_numpy(clip.speech.astype(np.float32) / 2**15), self.vocoder)
        return (mel - self.flow.mel_mean) / self.flow.mel_std


def _stacked(rows: Sequence[Tensor | None], frames: int, width: int) -> Tensor:
    """(B, frames, width), zeros where a row is None."""
    empty = torch.zeros(1, width)
    return torch.stack([_fitted(empty if row is None else row, frames) for row in rows])


def _present(rows: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor([0.0 if row is None else 1.0 for row in rows])


def _fitted(states: Tensor, frames: int) -> Tensor:
    """(n, D) padded with zeros or cut to (frames, D)."""
    return F.pad(states[:frames], (0, 0, 0, max(0, frames - len(states))))


# ---- losses that both encoders share ----------------------------------------------------------------------------


def letters_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Connectionist loss per letter of (B, J, CLASSES)."""
    lengths = -(-batch.samples // FRAME_SAMPLES)
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)  # (J, B, CLASSES)
    return F.ctc_loss(
        log_probabilities, batch.letters, lengths, batch.letter_counts, blank=BLANK, reduction="mean",
        zero_infinity=True,
    )  # fmt: skip


def lesson_loss(guessed: Tensor, batch: Batch) -> Tensor:
    """One minus the cosine to the teacher's states, over the frames of the clips that it heard. (B, J, D)"""
    heard = batch.frames & (batch.has_taught > 0)[:, None]
    if not heard.any():
        return guessed.sum() * 0.0
    taught = batch.taught[heard]
    taught = taught - taught.mean(0)  # the part common to all frames teaches nothing
    return 1 - F.cosine_similarity(guessed[heard].float(), taught, dim=-1).mean()
