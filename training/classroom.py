"""Lessons for the language model: examples spoken by voices, heard by the finished encoders, kept in shards.

A caller's words are said by a random voice and mostly changed on the way (pitch, pace, noise, phone line); the shop's
words are the speaking voice's, always begun with a token: one text has one coding, and drawing it needs no luck. Making
a lesson costs more than learning from it, so shards are made once, each from its own seed, and a broken-off run goes on
with the next one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from kimia.errors import AudioError, CheckpointError
from kimia.model.config import LMConfig
from kimia.model.encode import AudioEncoder
from kimia.model.lm import Row
from kimia.model.text import TextTokenizer
from kimia.model.writing import whole_file
from training.ahead import is_helper, made
from training.augment import CALLER, augmented, resampled
from training.language_model import Lesson, lesson
from training.progress import bar
from training.sounds import sound
from training.tasks import Example, Part, sample_example
from training.voices import CALLERS, HEARING_RATE, SPEAKER, SPEECH_RATE, Cache, Voice

KEEPS_PACE = ("style",)  # tasks whose answer is the pace: nothing else may change it
UNCHANGED = 0.2  # share of the speech that arrives as it was said


@dataclass(frozen=True)
class Classroom:
    """What turns an example into a lesson."""

    encoder: AudioEncoder
    tokenizer: TextTokenizer
    config: LMConfig
    cache: Cache
    voices: Sequence[Voice] = (SPEAKER, *CALLERS)

    def lesson(self, example: Example, rng: random.Random) -> Lesson:
        """Speak, hear and lay out an example. Raises AudioError when a voice fails, ConversationError."""
        noise = np.random.default_rng(rng.getrandbits(64))
        voice = rng.choice(self.voices)  # one caller a conversation
        waves = {
            index: self._wave(example, part, voice, noise)
            for index, part in enumerate(example.parts)
            if part.kind != "text"
        }
        clips = dict(zip(waves, self.encoder.encode(list(waves.values())), strict=True)) if waves else {}
        answer = self.codes(self._shop(example.answer)) if example.spoken else ()
        return lesson(example, clips, answer, self.config, self.tokenizer)

    def codes(self, wave: np.ndarray) -> tuple[int, ...]:
        """Codes of a wave at the hearing rate."""
        return tuple(self.encoder.vq.encode([wave])[0].tolist())

    def _wave(self, example: Example, part: Part, voice: Voice, noise: np.random.Generator) -> np.ndarray:
        """What is heard of a part, (S,) at the hearing rate."""
        if part.kind == "sound":
            return augmented(noise, sound(part.text, noise), CALLER).wave
        if part.role == "assistant":
            return self._shop(part.text)
        wave = resampled_speech(self.cache.speech(voice, part.text))
        if example.task in KEEPS_PACE:
            return resampled(wave, part.pace).astype(np.float32)
        if noise.random() < UNCHANGED:
            return wave
        return augmented(noise, wave, CALLER).wave

    def _shop(self, text: str) -> np.ndarray:
        return resampled_speech(self.cache.speech(SPEAKER, text))


def resampled_speech(wave: np.ndarray) -> np.ndarray:
    """(S,) from the speaking to the hearing rate."""
    return np.asarray(soxr.resample(wave, SPEECH_RATE, HEARING_RATE, quality="HQ"))


# ---- shards -----------------------------------------------------------------------------------------------------


def make_shards(classroom: Classroom, paths: Sequence[Path], count: int, workers: int, until: float = math.inf) -> bool:
    """Make the shards that are missing, of `count` lessons, each with its number as seed. Are all there now?"""
    missing = [number for number, path in enumerate(paths) if not path.exists()]

    def make(number: int) -> bool:
        return make_shard(classroom, paths[number], number, count, until=until)

    return all([*made(make, missing, min(workers, len(missing)))])


def make_shard(
    classroom: Classroom, path: Path, seed: int, count: int, *, held_out: bool = False, until: float = math.inf
) -> bool:
    """Write `count` lessons, the same for the same seed; nothing is done where the file is already there.

    False, and no file, when `time.monotonic` comes to be `until` before the last lesson. Raises AudioError that names
    the lesson whose voice failed; shards made before stay.
    """
    if path.exists():
        return True
    rng = random.Random(seed)
    rows = []
    for number in bar(range(count), desc=path.name, disable=is_helper() or None):
        if time.monotonic() >= until:
            return False
        example = sample_example(rng, held_out=held_out)
        try:
            rows.append(_plain(classroom.lesson(example, rng)))
        except AudioError as error:
            raise AudioError(f"{path.name}: lesson {number} ({example.task}): {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(rows, file)
    return True


def read_shard(path: Path) -> list[Lesson]:
    """The lessons of a shard. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such lessons; make them first")
    return [_lesson(row) for row in torch.load(path, map_location="cpu", weights_only=True)]


def _plain(made: Lesson) -> dict[str, Any]:
    """A lesson as tensors and lists."""
    row = made.row
    return {
        "audio": list(row.audio_ids),
        "text": list(row.text_ids),
        "segments": [list(segment) for segment in row.segments],
        "features": [features.half().clone() for features in row.features or ()],
        "text_targets": list(made.text_targets),
        "audio_targets": list(made.audio_targets),
    }


def _lesson(row: Mapping[str, Any]) -> Lesson:
    segments = [(begin, codes) for begin, codes in row["segments"]]
    features = [features.float() for features in row["features"]] or None
    targets = tuple(row["text_targets"]), tuple(row["audio_targets"])
    return Lesson(Row(row["audio"], row["text"], segments, features), *targets)


class Lessons:
    """Shards as an endless, repeatable sequence of batches of like length."""

    def __init__(self, paths: Sequence[Path], seed: int, neighbours: int = 64) -> None:
        lessons = [one for path in paths for one in read_shard(path)]
        self.lessons = sorted(lessons, key=lambda one: len(one.row.audio_ids))
        self.seed, self.neighbours = seed, neighbours

    def batch(self, step: int, size: int) -> list[Lesson]:
        """The lessons of a step: the same in every run."""
        rng = random.Random(f"{self.seed}/{step}")
        start = rng.randrange(max(1, len(self.lessons) - self.neighbours))
        return rng.choices(self.lessons[start : start + self.neighbours], k=size)
