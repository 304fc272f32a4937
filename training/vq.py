"""The semantic tokenizer: one codebook that hears every caller and can be spoken from.

    python -m training.vq --corpus FOLDER --run FOLDER [--mel WEIGHT] [--start RUN]

The network is the release's (`kimia.model.vq`), trained from nothing: its codes by `training.codebook`, its states by
what the teacher hears.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from kimia.model.checkpoint import SINGLE_FILE, VQ_TOKENIZER, Stored
from kimia.model.config import FeatureConfig, FlowConfig, VQConfig
from kimia.model.vq import VQTokenizer
from kimia.model.writing import write_safetensors
from training.codebook import CodeTraining, Recipe, Weights, judge
from training.config import trainer_configs
from training.corpus import GROUPS, Clip, balanced, held_out, load_clips
from training.hearing import FRAMES_PER_TOKEN, TAUGHT_EVERY, Batch, Hearing, lesson_loss
from training.initial import initialise
from training.loop import Loop, Plan, averaged_weights
from training.teacher import TEACHER_WIDTH, load_teacher


class VQTraining(CodeTraining):
    """Everything that is trained: the tokenizer, its codebook's averages, the heads that are thrown away."""

    def __init__(self, config: VQConfig, features: FeatureConfig, flow: FlowConfig, recipe: Recipe) -> None:
        width = config.encoder.d_model
        super().__init__(config.codebook_size, width, flow.mel_bins, recipe)
        self.tokenizer = VQTokenizer(config, features)
        self.tokenizer.to_empty(device="cpu")
        initialise(self.tokenizer)
        self.tokenizer.codebook.weight.requires_grad_(False)
        self.tokenizer.embed_positions.weight.requires_grad_(False)
        self.pupil = nn.Linear(width, TEACHER_WIDTH)
        self.last_layer = f"out{config.quantize_position - 1}"

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The named losses of a step, weighted."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            states = dict(self.tokenizer.states(batch.mel, batch.samples))
            guessed = self.pupil(states[self.last_layer])
        lesson = self.recipe.weights.lesson * lesson_loss(guessed, batch)
        return {"lesson": lesson} | self.code_losses(states["hidden"].float(), batch, step)

    def finished(self) -> VQTokenizer:
        """The tokenizer with its codebook filled in."""
        with torch.no_grad():
            self.tokenizer.codebook.weight.copy_(self.book.rows)
        return self.tokenizer.eval()

    def codes_of(self, clip: Clip) -> Tensor:
        """The codes that serving gives: `VQTokenizer.encode` of the whole clip."""
        return self.finished().encode([clip.heard()])[0]


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
    parser.add_argument("--limit", type=int, help="clips of the speaker, and as many of callers")
    parser.add_argument("--taught-every", type=int, default=TAUGHT_EVERY, help="clips, of which the teacher hears one")
    parser.add_argument("--judge-only", action="store_true")
    options = parser.parse_args()
    configs = trainer_configs()
    recipe = Recipe(options.continuous, options.batch, Weights(mel=options.mel), bfloat16=options.bfloat16)
    training = VQTraining(configs.vq, configs.vq_features, configs.flow, recipe)
    if options.start is not None:
        averaged_weights(options.start, training)
    teacher = load_teacher()
    clips = [] if options.judge_only else balanced(load_clips(options.corpus, "train"), options.limit)
    hearing = Hearing(clips, teacher, configs.vq_features, configs, 1, options.taught_every)
    if not options.judge_only:
        plan = Plan(options.steps, options.rate, seconds=options.seconds)
        Loop(
            "vq", training, lambda step: training.losses(hearing.batch(step, recipe.batch), step), plan, options.run
        ).run()
    averaged_weights(options.run, training)
    for group in GROUPS:
        found = judge(training, held_out(options.corpus, group, 100), hearing, training.codes_of)
        print(group, *found.items(), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
