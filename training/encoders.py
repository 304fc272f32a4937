"""The continuous encoder: a small Whisper encoder that learns to hear what Whisper tiny.en hears.

    python -m training.encoders --corpus FOLDER --run FOLDER

It sees whole segments, as in use: a sentence and then silence, or several sentences and sound events. Besides the
teacher's states it must give letters and name the sound of every frame, so that what the language model needs is in
the features. Only the encoder is shipped; the three heads are thrown away.
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

from kimia.model.checkpoint import SINGLE_FILE, Stored
from kimia.model.config import EncoderConfig, FeatureConfig
from kimia.model.whisper import WhisperFeatures
from kimia.model.writing import write_safetensors
from training.config import trainer_configs
from training.corpus import GROUPS, Clip, held_out
from training.hearing import (
    EVENTS,
    FRAMES_PER_TOKEN,
    Batch,
    Hearing,
    events_loss,
    lesson_loss,
    letters_loss,
)
from training.initial import initialise
from training.loop import Loop, Plan, averaged_weights, fast_products
from training.scores import CLASSES, error_rate, greedy
from training.states import taught_clips
from training.teacher import TEACHER_WIDTH

FOLDER = "whisper-large-v3"  # in a checkpoint


@dataclass(frozen=True)
class Weights:
    """How much each loss counts."""

    letters: float = 1.0
    lesson: float = 2.0
    events: float = 0.3


class EncoderTraining(nn.Module):
    """The encoder and its three heads."""

    def __init__(self, config: EncoderConfig, features: FeatureConfig, weights: Weights = Weights()) -> None:
        super().__init__()
        self.weights = weights
        self.whisper = WhisperFeatures(config, features, FRAMES_PER_TOKEN)
        self.whisper.to_empty(device="cpu")
        initialise(self.whisper)
        self.whisper.encoder.embed_positions.weight.requires_grad_(False)
        self.letters = nn.Linear(config.d_model, CLASSES)
        self.events = nn.Linear(config.d_model, len(EVENTS))
        self.pupil = nn.Linear(config.d_model, TEACHER_WIDTH)

    def states(self, mel: Tensor) -> Tensor:
        """Whole segments (B, M, T) -> (B, T / 2, d)."""
        with fast_products():
            states: Tensor = self.whisper.encoder(mel).last_hidden_state
        return states.float()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The named losses of a step, weighted."""
        states = self.states(batch.mel)
        return {
            "letters": self.weights.letters * letters_loss(self.letters(states), batch),
            "lesson": self.weights.lesson * lesson_loss(self.pupil(states), batch),
            "events": self.weights.events * events_loss(self.events(states), batch),
        }


@torch.no_grad()
def judge(training: EncoderTraining, clips: Sequence[Clip]) -> Mapping[str, Any]:
    """Character and word errors read from the features that serving gives (`WhisperFeatures.encode`)."""
    training.eval()
    texts, read = [], []
    for clip in clips:
        features = training.whisper.encode([clip.heard()])[0]  # (N, 4 d)
        texts.append(clip.item.text)
        read.append(greedy(training.letters(features.view(-1, features.shape[1] // FRAMES_PER_TOKEN))))
    return {
        "characters": error_rate(texts, read, words=False),
        "words": error_rate(texts, read, words=True),
        "examples": list(zip(texts, read, strict=True))[:3],
    }


def write_encoder(root: Path, training: EncoderTraining) -> None:
    """Write the encoder's weights into a checkpoint folder that has its config files, in the released layout."""
    source = {
        f"model.encoder.{name}": Stored(tuple(value.shape), "float16", lambda value=value: value)  # type: ignore[misc]
        for name, value in training.whisper.encoder.state_dict().items()
    }
    write_safetensors(root / FOLDER / SINGLE_FILE, source)  # the release's file has no metadata


def main() -> None:
    """Train the continuous encoder, then judge it on held-out texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    configs = trainer_configs()
    training = EncoderTraining(configs.whisper, configs.whisper_features)
    hearing = Hearing(*taught_clips(options.corpus), configs.whisper_features, configs, seed=2)
    plan = Plan(options.steps, options.rate, seconds=options.seconds)
    Loop(
        "encoder", training, lambda step: training.losses(hearing.windows(step, options.batch)), plan, options.run
    ).run()
    averaged_weights(options.run, training)
    for group in GROUPS:
        print(group, *judge(training, held_out(options.corpus, group, 100)).items(), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
