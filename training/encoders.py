"""The continuous encoder: a small Whisper encoder that learns to hear what Whisper tiny.en hears.

    python -m training.encoders --corpus FOLDER --run FOLDER --checkpoint FOLDER

It hears single sentences first, then whole segments, as in use: a sentence and then silence, or several sentences and
sound events. Besides the teacher's states it must give letters and name the sound of every frame, so that what the
language model needs is in the features. Only the encoder is shipped; the three heads are kept for later runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.checkpoint import SINGLE_FILE, Stored
from kimia.model.config import EncoderConfig, FeatureConfig
from kimia.model.whisper import WhisperFeatures, load_whisper
from kimia.model.writing import whole_file, write_safetensors
from training.ahead import Ahead
from training.augment import CALLER, GENTLE
from training.config import trainer_configs, write_configs
from training.heads import read_heads, take_over, write_heads
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
from training.loop import Loop, averaged_weights, device_of, fast_products
from training.options import leave, plan_of, trainer_parser
from training.scores import CLASSES, ErrorRate, error_rate, greedy
from training.states import placeless, taught_clips
from training.teacher import TEACHER_WIDTH

FOLDER = "whisper-large-v3"  # in a checkpoint
STAGE = "encoder"
LISTENING_SHARE = (
    0.15  # of the steps: before letters count in full; from nothing, their gradient is the larger and blind
)
LISTENING_LETTERS = 0.05
GENTLE_SHARE = 0.25  # of the steps: before callers' pitch and pace are changed too
CLIPS_SHARE = 0.6  # of the steps: before whole segments are attended, which costs a third more a second of speech
CLIPS = 3  # for one segment


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

    @property
    def heads(self) -> nn.ModuleDict:
        """What is not shipped."""
        return nn.ModuleDict({"letters": self.letters, "events": self.events, "pupil": self.pupil})

    def states(self, mel: Tensor) -> Tensor:
        """(B, M, T) -> (B, T / 2, d), as the served encoder gives them for whole segments; here of any length."""
        encoder = self.whisper.encoder
        with fast_products(device_of(self)):
            x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
            x = x + encoder.embed_positions.weight[: x.shape[1]]
            for layer in encoder.layers:
                x = layer(x, None)
            return encoder.layer_norm(x).float()  # type: ignore[no-any-return]

    def losses(self, batch: Batch, letters: float = 1.0) -> dict[str, Tensor]:
        """The named losses of a step, weighted; `letters` is the share of that loss's weight that counts."""
        batch = batch.to(device_of(self))
        states = self.states(batch.mel)
        return {
            "letters": letters * self.weights.letters * letters_loss(self.letters(states), batch),
            "lesson": self.weights.lesson * lesson_loss(self.pupil(states), batch),
            "events": self.weights.events * events_loss(self.events(states), batch),
        }


@torch.no_grad()
def judge(training: EncoderTraining, texts: Sequence[str], waves: Sequence[np.ndarray]) -> tuple[ErrorRate, ErrorRate]:
    """Character and word errors read from the features that serving gives (`WhisperFeatures.encode`)."""
    training.eval()
    read = [greedy(training.letters(_frames(training, wave))) for wave in waves]
    return error_rate(texts, read, words=False), error_rate(texts, read, words=True)


@torch.no_grad()
def name_event(training: EncoderTraining, wave: np.ndarray) -> str:
    """What sounds in a wave (S,) at the hearing rate, one of EVENTS: the likeliest over all frames."""
    training.eval()
    likely = training.events(_frames(training, wave)).log_softmax(-1).mean(0)
    return EVENTS[int(likely.argmax())]


def _frames(training: EncoderTraining, wave: np.ndarray) -> Tensor:
    """The 50 Hz frames (4 N, d) of the features that serving gives."""
    features = training.whisper.encode([wave])[0]  # (N, 4 d)
    return features.view(-1, features.shape[1] // FRAMES_PER_TOKEN)


def write_encoder(root: Path, training: EncoderTraining) -> None:
    """Write the encoder's weights into a checkpoint folder that has its config files, in the released layout."""
    source = {
        f"model.encoder.{name}": Stored(tuple(value.shape), "float16", lambda value=value: value)  # type: ignore[misc]
        for name, value in training.whisper.encoder.state_dict().items()
    }
    with whole_file(root / FOLDER / SINGLE_FILE) as partial:
        write_safetensors(partial, source)  # the release's file has no metadata
    write_heads(root, STAGE, training.heads)


def read_encoder(root: Path, training: EncoderTraining) -> None:
    """Begin with the weights of a checkpoint folder. Raises CheckpointError or WeightsError."""
    loaded = load_whisper(root / FOLDER, FRAMES_PER_TOKEN, "cpu", torch.float32)
    take_over(training.whisper, loaded.state_dict(), str(root / FOLDER))
    read_heads(root, STAGE, training.heads)


def main() -> None:
    """Train the continuous encoder."""
    options = trainer_parser(main.__doc__, steps=6000, batch=2, rate=2e-3).parse_args()
    configs = trainer_configs()
    training = EncoderTraining(configs.whisper, configs.whisper_features)
    if options.start is not None:
        read_encoder(options.start, training)
    clips, states = taught_clips(options.corpus)
    hearing = Hearing(clips, placeless(clips, states), configs.whisper_features, configs, seed=2)

    def batch(step: int) -> Batch:
        done = step / options.steps
        if done < CLIPS_SHARE:
            return hearing.batch(step, CLIPS * options.batch, GENTLE if done < GENTLE_SHARE else CALLER)
        return hearing.windows(step, options.batch)

    data = Ahead(batch, options.steps, options.workers)

    def losses(step: int) -> dict[str, Tensor]:
        listening = step / options.steps < LISTENING_SHARE
        return training.losses(data(step), letters=LISTENING_LETTERS if listening else 1.0)

    progress = Loop(STAGE, training, losses, plan_of(options), options.run).run()
    averaged_weights(options.run, training)
    write_configs(options.checkpoint)
    write_encoder(options.checkpoint, training)
    leave(STAGE, progress, options.steps)


if __name__ == "__main__":
    main()
