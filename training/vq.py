"""The semantic tokenizer: one codebook that hears every caller and can be spoken from.

    python -m training.vq --corpus FOLDER --study RUN --encoder RUN --run FOLDER

The network is the release's (`kimia.model.vq`). It begins with the continuous encoder's weights, which hear already,
and with the codes of `training.study`, which both letters and speech can be read from; it learns to choose the code
that the teacher's states choose. The codebook then follows its own states.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.errors import CheckpointError
from kimia.model.checkpoint import SINGLE_FILE, VQ_TOKENIZER, Stored
from kimia.model.config import FeatureConfig, FlowConfig, VQConfig
from kimia.model.vq import VQTokenizer
from kimia.model.writing import write_safetensors
from training.codebook import CodeTraining, Recipe, judge
from training.config import trainer_configs
from training.corpus import GROUPS, Clip, held_out
from training.encoders import EncoderTraining
from training.hearing import FRAMES_PER_TOKEN, Batch, Hearing, lesson_loss
from training.initial import initialise
from training.loop import Loop, Plan, averaged_weights, fast_products
from training.states import taught_clips
from training.study import TaughtCodes, load_study
from training.teacher import TEACHER_WIDTH

CODE_SOFTNESS = 0.1  # of the choice among codes: squared distance a dimension that costs half a nat


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
        self.guide: tuple[TaughtCodes, ...] = ()  # in a tuple: none of its weights are trained or kept

    def begin(self, encoder: EncoderTraining, study: TaughtCodes) -> None:
        """Take over the encoder's weights and the study's codes and head. Raises CheckpointError when widths differ."""
        heard = encoder.whisper.encoder.state_dict()
        try:
            missing = self.tokenizer.load_state_dict(
                {name: value for name, value in heard.items() if not name.startswith("layer_norm.")}, strict=False
            )
            self.book.load_state_dict(study.book.state_dict())
            self.head.load_state_dict(study.head.state_dict())
        except RuntimeError as error:
            raise CheckpointError(f"encoder, study and tokenizer must have one width: {error}") from error
        if missing.missing_keys != ["codebook.weight"]:
            raise CheckpointError(f"the encoder lacks {missing.missing_keys}: it must have the tokenizer's layers")

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The named losses of a step, weighted."""
        with fast_products():
            states = dict(self.tokenizer.states(batch.mel, batch.samples))
            guessed = self.pupil(states[self.last_layer])
        hidden = states["hidden"].float()
        lesson = self.recipe.weights.lesson * lesson_loss(guessed, batch)
        choice = {"choice": self.recipe.weights.choice * self.choice_loss(hidden, batch)} if self.guide else {}
        return {"lesson": lesson} | choice | self.code_losses(hidden, batch, step)

    def choice_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the guide's choice of a code, nearer codes being likelier, of states (B, K, d)."""
        (guide,) = self.guide
        taught = batch.taught_frames[:, ::FRAMES_PER_TOKEN]
        with torch.no_grad():
            right = guide.book.nearest(guide.hidden(batch.taught)[taught])
        distances = torch.cdist(hidden[taught], self.book.rows).square()
        return F.cross_entropy(-distances / (2 * CODE_SOFTNESS * hidden.shape[-1]), right)

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
    parser.add_argument("--encoder", type=Path, required=True, help="the continuous encoder's run")
    parser.add_argument("--study", type=Path, required=True, help="run of the study, whose codes are learned")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    configs = trainer_configs()
    training = VQTraining(configs.vq, configs.vq_features, configs.flow, Recipe(0, options.batch))
    study = load_study(options.study, configs)
    encoder = EncoderTraining(configs.whisper, configs.whisper_features)
    averaged_weights(options.encoder, encoder)
    training.begin(encoder, study)
    training.guide = (study,)
    hearing = Hearing(*taught_clips(options.corpus), configs.vq_features, configs, seed=1)
    plan = Plan(options.steps, options.rate, seconds=options.seconds)
    Loop(
        "vq", training, lambda step: training.losses(hearing.batch(step, options.batch), step), plan, options.run
    ).run()
    averaged_weights(options.run, training)
    for group in GROUPS:
        found = judge(training, held_out(options.corpus, group, 100), hearing, training.codes_of)
        print(group, *found.items(), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
