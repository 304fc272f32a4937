"""What the speaking stages learn from: the speaking voice's clips as codes, mel and sound.

The codes are those that the finished tokenizer gives for the clip. Half of the clips begin with a token, as the answers
do that the language model learns; the others at one of a few places inside the first one: the same sentence has many
codings, and the flow model should draw the same speech from each. Codes are kept, for the tokenizer costs more than a
step of the flow model. Half of the steps have what the shop says, which is what is synthesised in calls. Sentences that
differ in their digits alone are many; each is drawn less often for it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
import torch
from torch import Tensor

from kimia.errors import AudioError, ParameterError
from kimia.model.bigvgan import mel_spectrogram
from kimia.model.config import FlowConfig, VocoderConfig
from kimia.model.vq import VQTokenizer
from training.corpus import TOKEN_SAMPLES, Clip
from training.texts import is_said_by_shop, masked
from training.voices import HEARING_RATE, SPEAKER, SPEECH_RATE

FRAMES_PER_TOKEN = 4
NEIGHBOURS = 64  # clips of like length that a batch is drawn from
PLACES = 6  # inside a token, where clips that are coded begin: 320 samples apart, most of them between mel frames


@dataclass(frozen=True, eq=False)
class Spoken:
    """Some speech, N tokens long."""

    codes: Tensor  # (N,) int64
    mel: Tensor  # (4 N, M) normalised
    wave: Tensor  # (N * TOKEN_SAMPLES,) float32 at SPEECH_RATE

    def __post_init__(self) -> None:
        tokens = len(self.codes)
        if len(self.mel) != FRAMES_PER_TOKEN * tokens or len(self.wave) != TOKEN_SAMPLES * tokens:
            raise AudioError(
                f"{tokens} codes, {len(self.mel)} mel frames and {len(self.wave)} samples do not belong together"
            )


class _Pool:
    """Clips by length, the more there are that differ in digits alone the less often each."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = sorted(clips, key=lambda clip: clip.tokens)
        often = Counter(masked(clip.item.text) for clip in self.clips)
        self.weights = [often[masked(clip.item.text)] ** -0.5 for clip in self.clips]

    def draw(self, rng: random.Random, count: int) -> list[Clip]:
        """Clips of about the length of one that is drawn: a rare one is met more often than its neighbours."""
        (middle,) = rng.choices(range(len(self.clips)), self.weights)
        start = max(0, min(middle, len(self.clips) - NEIGHBOURS // 2) - NEIGHBOURS // 2)
        near = slice(start, start + NEIGHBOURS)
        return rng.choices(self.clips[near], self.weights[near], k=count)


class Speaking:
    """The speaking voice's clips, coded."""

    def __init__(
        self, clips: Sequence[Clip], tokenizer: VQTokenizer | None, flow: FlowConfig, vocoder: VocoderConfig, seed: int
    ) -> None:
        strange = {clip.item.voice for clip in clips} - {SPEAKER.name}
        if strange or not clips:
            raise ParameterError(
                f"speech is learned from clips of {SPEAKER.name} alone, got {sorted(strange) or 'none'}"
            )
        self.tokenizer, self.flow, self.vocoder, self.seed = tokenizer, flow, vocoder, seed
        sides = [[clip for clip in clips if is_said_by_shop(clip.item.text) == shop] for shop in (True, False)]
        self.pools = [_Pool(side) for side in sides if side]
        self._kept: dict[tuple[Clip, int], Tensor] = {}  # codes by clip and offset

    def spoken(self, clip: Clip, offset: int = 0) -> Spoken:
        """A clip with `offset` samples of silence before it. Without a tokenizer all codes are 0."""
        samples = np.pad(clip.speech.astype(np.float32) / 2**15, (offset, TOKEN_SAMPLES - offset if offset else 0))
        wave = torch.from_numpy(samples)
        mel = (mel_spectrogram(wave, self.vocoder) - self.flow.mel_mean) / self.flow.mel_std
        if self.tokenizer is None:
            return Spoken(torch.zeros(len(samples) // TOKEN_SAMPLES, dtype=torch.long), mel, wave)
        if (clip, offset) not in self._kept:
            heard = soxr.resample(samples, SPEECH_RATE, HEARING_RATE, quality="HQ")
            self._kept[clip, offset] = self.tokenizer.encode([heard])[0]
        # A copy: a tensor that another process sends keeps a file open for as long as it lives
        return Spoken(self._kept[clip, offset].clone(), mel, wave)

    def _offset(self, rng: random.Random) -> int:
        places = PLACES if self.tokenizer is not None else TOKEN_SAMPLES
        return rng.choice((0, rng.randrange(places))) * (TOKEN_SAMPLES // places)

    def batch(self, step: int, size: int) -> list[Spoken]:
        """The speech of a step, alike in length: the same in every run."""
        rng = random.Random(f"{self.seed}/{step}")
        chosen = rng.choice(self.pools).draw(rng, size)
        return [self.spoken(clip, self._offset(rng)) for clip in chosen]
