"""Can one codebook be both robust to speakers and spoken from? The teacher's states answer before any encoder exists.

    python -m training.study --corpus FOLDER --run FOLDER --mel 2

A linear layer on Whisper tiny.en's own states (pooled to 12.5 Hz) feeds the codebook and heads of `training.codebook`.
Nothing of this is shipped. It bounds what a pupil of that teacher can reach with 512 codes, at a tenth of the cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kimia.errors import ParameterError
from kimia.model.vq import pool
from training.ahead import Ahead
from training.codebook import CodeTraining, Recipe, Weights, judge
from training.config import MicroConfigs, trainer_configs
from training.corpus import GROUPS, Clip, balanced, held_out
from training.hearing import FRAMES_PER_TOKEN, Batch, Hearing
from training.listening import griffin_lim, word_errors
from training.loop import Loop, averaged_weights, device_of
from training.options import add_device, add_slice, leave, plan_of
from training.scores import ErrorRate
from training.states import taught_clips
from training.teacher import TEACHER_WIDTH, Teacher, load_teacher

BATCH = 16  # clips
ALONE_STEPS = 100  # first, with the speaking voice alone: letters are found at once there, and hardly at all among many


class TaughtCodes(CodeTraining):
    """Codes of what the teacher hears."""

    def __init__(self, codes: int, width: int, mel_bins: int, recipe: Recipe) -> None:
        super().__init__(codes, width, mel_bins, recipe)
        self.inward = nn.Sequential(nn.LayerNorm(TEACHER_WIDTH), nn.Linear(TEACHER_WIDTH, width), nn.LayerNorm(width))

    def hidden(self, taught: Tensor) -> Tensor:
        """The teacher's states (B, J, D) -> (B, K, d)."""
        return self.inward(pool(taught, FRAMES_PER_TOKEN, "avg"))  # type: ignore[no-any-return]

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The named losses of a step, weighted."""
        batch = batch.to(device_of(self))
        return self.code_losses(self.hidden(batch.taught), batch, step)

    def codes_of(self, clip: Clip, teacher: Teacher) -> Tensor:
        """The codes of a clip, (K,)."""
        return self.book.nearest(self.hidden(teacher.hear(clip.heard())[None])[0])


def load_study(folder: Path, configs: MicroConfigs) -> TaughtCodes:
    """What a run of the study has learned. Raises CheckpointError."""
    study = TaughtCodes(configs.vq.codebook_size, configs.vq.encoder.d_model, configs.flow.mel_bins, Recipe(0))
    averaged_weights(folder, study)
    return study


@torch.no_grad()
def listen(training: TaughtCodes, clips: Sequence[Clip], hearing: Hearing, teacher: Teacher) -> dict[str, ErrorRate]:
    """Word errors of the speaker's clips: as they are, through Griffin-Lim, and through codes and Griffin-Lim."""
    training.eval()
    waves: dict[str, list[np.ndarray]] = {"original": [], "mel": [], "codes": []}
    for clip in clips:
        target = hearing.speech_target(clip)
        if target is None:
            raise ParameterError(f"only the speaking voice can be listened to, got {clip.item.voice}")
        codes = training.codes_of(clip, teacher)
        drawn = training.head(training.book.rows[codes][None])[1][0]
        waves["original"].append(clip.speech.astype(np.float32) / 2**15)
        for name, mel in (("mel", target), ("codes", drawn)):
            natural = mel * hearing.flow.mel_std + hearing.flow.mel_mean
            waves[name].append(griffin_lim(natural, hearing.vocoder).numpy())
    texts = [clip.item.text for clip in clips]
    return {name: word_errors(texts, made) for name, made in waves.items()}


def main() -> None:
    """Train codes on the teacher's states, then judge them on held-out texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--continuous", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--mel", type=float, default=2.0, help="weight of the speaker's mel")
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--listen", type=int, default=0, help="clips of the speaker that the judge listens to")
    add_slice(parser)
    add_device(parser)
    options = parser.parse_args()
    configs = trainer_configs()
    recipe = Recipe(options.continuous, Weights(mel=options.mel))
    width = configs.vq.encoder.d_model
    training = TaughtCodes(configs.vq.codebook_size, width, configs.flow.mel_bins, recipe)
    clips, states = taught_clips(options.corpus)
    hearing = Hearing(clips, states, configs.vq_features, configs, seed=1)
    alone = Hearing(balanced(clips, None, 0), states, configs.vq_features, configs, seed=1)

    data = Ahead(
        lambda step: (alone if step < ALONE_STEPS else hearing).batch(step, BATCH), options.steps, options.workers
    )

    def losses(step: int) -> dict[str, Tensor]:
        return training.losses(data(step), step)

    leave("study", Loop("study", training, losses, plan_of(options), options.run).run(), options.steps)
    averaged_weights(options.run, training)
    teacher = load_teacher()
    if options.listen:
        clips = held_out(options.corpus, "speaker", options.listen)
        print(*listen(training, clips, hearing, teacher).items(), sep="\n", flush=True)
    for group in GROUPS if options.test else ():
        clips = held_out(options.corpus, group, options.test)
        found = judge(training, clips, hearing, lambda clip: training.codes_of(clip, teacher))
        print(group, *found.items(), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
