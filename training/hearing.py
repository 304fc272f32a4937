"""What both encoders learn from: batches of augmented clips with letters, the teacher's states, and mel targets.

The teacher hears each clean clip once. Its states are stretched to the augmented clip's pace, so a pupil learns to hear
the same thing whoever says it, however fast, and through whatever line.

Shapes: B clips, M mel bins, T mel frames, J = T / 2 encoder frames (50 Hz), D the teacher's width, F vocoder mel bins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kimia.model.audio import LogMel
from kimia.model.bigvgan import mel_spectrogram
from kimia.model.config import FeatureConfig
from training.augment import CALLER, GENTLE, Chances, augmented
from training.config import MicroConfigs
from training.corpus import Clip
from training.scores import BLANK, letter_ids
from training.sounds import SOUNDS, sound
from training.states import States
from training.teacher import TEACHER_WIDTH
from training.voices import SPEAKER

TOKEN_SAMPLES = 1280  # at the hearing rate
FRAME_SAMPLES = 320
FRAMES_PER_TOKEN = TOKEN_SAMPLES // FRAME_SAMPLES
NEIGHBOURS = 96  # clips of like length that a batch is drawn from
EVENTS = ("speech", *SOUNDS)
EVENT_CHANCE = 0.12  # that a window's next piece is a sound event
ALONE_CHANCE = 0.3  # that a window has one piece, then silence, as in use
MOST_GAP_TOKENS = 5  # of silence between pieces
SPEAKER_GENTLE = 0.75  # share of the speaker's clips that keep pitch and pace, and so have a mel target


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's clips, padded to the longest."""

    mel: Tensor  # (B, M, T)
    samples: Tensor  # (B,) samples of each clip
    letters: Tensor  # (all letters,) of all clips, end to end
    letter_counts: Tensor  # (B,)
    taught: Tensor  # (B, J, D) the teacher's states, zero behind a clip and where there are none
    taught_frames: Tensor  # (B, J) true where `taught` counts
    spoken: Tensor  # (B, J, F) normalised mel of clean speech, zero where there is none
    spoken_frames: Tensor  # (B, J) true where `spoken` counts
    events: Tensor  # (B, J) what sounds in each frame: index in EVENTS, -1 where nothing is said about it

    @property
    def frames(self) -> Tensor:
        """(B, J) true for the frames of a clip."""
        starts = torch.arange(self.taught.shape[1], device=self.samples.device) * FRAME_SAMPLES
        return starts < self.samples[:, None]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})


class Hearing:
    """Batches from clips."""

    def __init__(
        self,
        clips: Sequence[Clip],
        taught: States | None,
        features: FeatureConfig,
        configs: MicroConfigs,
        seed: int,
    ) -> None:
        mixed = random.Random(seed).sample(list(clips), len(clips))  # neighbours of one length are of all voices
        self.clips = sorted(mixed, key=lambda clip: clip.tokens)
        self.taught, self.vocoder, self.flow, self.seed = taught, configs.vocoder, configs.flow, seed
        self.segment = features.segment_samples
        self.log_mel = LogMel(features)
        self._spoken: dict[int, Tensor] = {}

    # ---- one clip a row: for the tokenizer, which pads no more than it must ----

    def batch(self, step: int, size: int, chances: Chances = CALLER) -> Batch:
        """The batch of a step, of clips alike in length: the same in every run."""
        rng, noise = self._generators(step)
        start = rng.randrange(max(1, len(self.clips) - NEIGHBOURS))
        alike = range(start, min(start + NEIGHBOURS, len(self.clips)))
        chosen = rng.sample(alike, min(size, len(alike)))
        rows = [_Row([self._clip(index, rng, noise, chances)]) for index in chosen]
        longest = max(row.tokens for row in rows) * FRAMES_PER_TOKEN
        # Each clip's own padding, as the tokenizer pads it, then zeros
        mels = [self.log_mel(row.wave(), row.tokens * TOKEN_SAMPLES) for row in rows]
        mel = torch.stack([F.pad(torch.from_numpy(one), (0, 2 * longest - one.shape[1])) for one in mels])
        return self._stacked(rows, mel, longest)

    # ---- a whole segment a row: for Whisper, which always attends one ----

    def windows(self, step: int, size: int, chances: Chances = CALLER) -> Batch:
        """The windows of a step: clips and sound events one after the other, padded to a segment."""
        rng, noise = self._generators(step)
        rows = [self._window(rng, noise, chances) for _ in range(size)]
        mels = [self.log_mel(row.wave(), self.segment) for row in rows]
        return self._stacked(rows, torch.from_numpy(np.stack(mels)), self.segment // FRAME_SAMPLES)

    def _window(self, rng: random.Random, noise: np.random.Generator, chances: Chances) -> _Row:
        row = _Row([])
        most = 1 if rng.random() < ALONE_CHANCE else self.segment
        while len(row.pieces) < most:
            piece = (
                _event(noise, rng.choice(list(SOUNDS)))
                if rng.random() < EVENT_CHANCE
                else self._clip(rng.randrange(len(self.clips)), rng, noise, chances)
            )
            piece = replace(piece, gap=rng.randrange(MOST_GAP_TOKENS + 1))
            if row.pieces and (row.tokens + piece.tokens) * TOKEN_SAMPLES > self.segment:
                break
            row.pieces.append(piece)
        return row

    # ---- pieces and rows ----

    def _generators(self, step: int) -> tuple[random.Random, np.random.Generator]:
        return random.Random(f"{self.seed}/{step}"), np.random.default_rng([self.seed, step])

    def _clip(self, index: int, rng: random.Random, noise: np.random.Generator, chances: Chances) -> _Piece:
        clip = self.clips[index]
        keep = clip.item.voice == SPEAKER.name and rng.random() < SPEAKER_GENTLE
        changed = augmented(noise, clip.heard(), GENTLE if keep else chances)
        wave = changed.wave[: self.segment]
        return _Piece(
            wave=wave,
            letters=letter_ids(clip.item.text),
            taught=self._lesson(index, len(wave), changed.pace),
            spoken=self._target(index, len(wave)) if changed.pace == 1.0 else None,
            event=0,
        )

    def _stacked(self, rows: list[_Row], mel: Tensor, frames: int) -> Batch:
        size = len(rows)
        letters = [row.letters() for row in rows]
        batch = Batch(
            mel=mel,
            samples=torch.tensor([min(len(row.wave()), frames * FRAME_SAMPLES) for row in rows]),
            letters=torch.tensor([letter for row in letters for letter in row], dtype=torch.long),
            letter_counts=torch.tensor([len(row) for row in letters]),
            taught=torch.zeros(size, frames, TEACHER_WIDTH),
            taught_frames=torch.zeros(size, frames, dtype=torch.bool),
            spoken=torch.zeros(size, frames, self.flow.mel_bins),
            spoken_frames=torch.zeros(size, frames, dtype=torch.bool),
            events=torch.full((size, frames), -1),
        )
        for index, row in enumerate(rows):
            row.fill(batch, index)
        return batch

    # ---- targets ----

    def _lesson(self, index: int, samples: int, pace: float) -> Tensor | None:
        """The teacher's states at the pace of the changed clip, (J, D); None without a teacher."""
        if self.taught is None:
            return None
        states = self.taught(self.clips[index]).float()
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


@dataclass(frozen=True, eq=False)
class _Piece:
    """A clip or a sound event, changed, with all that is to be learned from it."""

    wave: np.ndarray  # (S,)
    letters: list[int]
    taught: Tensor | None  # (frames, D)
    spoken: Tensor | None  # (frames, F)
    event: int  # index in EVENTS
    gap: int = 0  # tokens of silence before it

    @property
    def tokens(self) -> int:
        """With the gap, in whole tokens."""
        return self.gap + -(-len(self.wave) // TOKEN_SAMPLES)


@dataclass(frozen=True, eq=False)
class _Row:
    """Pieces one after the other, each at the start of a token."""

    pieces: list[_Piece]

    @property
    def tokens(self) -> int:
        """Length in whole tokens."""
        return sum(piece.tokens for piece in self.pieces)

    def wave(self) -> np.ndarray:
        """(S,): all pieces, silence between them, none behind the last."""
        padded = [
            np.pad(piece.wave, (piece.gap * TOKEN_SAMPLES, -len(piece.wave) % TOKEN_SAMPLES)) for piece in self.pieces
        ]
        excess = -len(self.pieces[-1].wave) % TOKEN_SAMPLES
        return np.concatenate(padded)[: self.tokens * TOKEN_SAMPLES - excess]

    def letters(self) -> list[int]:
        """Of all pieces, spaces between them."""
        spoken = [piece.letters for piece in self.pieces if piece.letters]
        return [letter for piece in spoken for letter in (*piece, *letter_ids(" "))][:-1]

    def fill(self, batch: Batch, index: int) -> None:
        """Put the targets into a row of a batch."""
        start = 0
        for piece in self.pieces:
            begin = start + piece.gap * FRAMES_PER_TOKEN
            _put(batch.taught[index], batch.taught_frames[index], piece.taught, begin)
            _put(batch.spoken[index], batch.spoken_frames[index], piece.spoken, begin)
            batch.events[index, begin : begin + -(-len(piece.wave) // FRAME_SAMPLES)] = piece.event
            start += piece.tokens * FRAMES_PER_TOKEN


def _put(target: Tensor, present: Tensor, states: Tensor | None, begin: int) -> None:
    """Write states (n, D) into target (J, D) from frame `begin` on, as far as it reaches."""
    if states is not None:
        count = min(len(states), len(target) - begin)
        target[begin : begin + count] = states[:count]
        present[begin : begin + count] = True


def _event(noise: np.random.Generator, kind: str) -> _Piece:
    return _Piece(sound(kind, noise), [], None, None, EVENTS.index(kind))


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
    heard = batch.taught_frames
    if not heard.any():
        return guessed.sum() * 0.0
    taught = batch.taught[heard]
    taught = taught - taught.mean(0)  # the part common to all frames teaches nothing
    return 1 - F.cosine_similarity(guessed[heard].float(), taught, dim=-1).mean()


def events_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of (B, J, events) over the frames where something sounds."""
    return F.cross_entropy(logits.float().flatten(0, 1), batch.events.flatten(), ignore_index=-1)
