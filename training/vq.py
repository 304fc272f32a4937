"""The semantic tokenizer: one codebook that hears every caller and can be spoken from.

    python -m training.vq --corpus FOLDER --study RUN --run FOLDER --checkpoint FOLDER

The network is the release's (`kimia.model.vq`). It begins with the weights of the checkpoint's continuous encoder,
which hears already, and with the codes of `training.study`, which both letters and speech can be read from; it learns
to choose the code that the teacher's states choose. Only then do the codes follow its own states.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.checkpoint import SINGLE_FILE, VQ_TOKENIZER, Stored
from kimia.model.config import FeatureConfig, FlowConfig, VQConfig
from kimia.model.vq import VQTokenizer, load_vq
from kimia.model.whisper import encoder_source
from kimia.model.writing import whole_file, write_safetensors
from training.ahead import Ahead
from training.codebook import CodeTraining, Recipe
from training.config import trainer_configs, write_configs
from training.corpus import Clip
from training.encoders import EncoderTraining, read_encoder
from training.heads import read_heads, take_over, write_heads
from training.hearing import FRAMES_PER_TOKEN, Batch, Hearing, lesson_loss
from training.initial import initialise
from training.loop import Loop, averaged_weights, device_of, fast_products
from training.options import leave, plan_of, trainer_parser
from training.states import taught_clips
from training.study import TaughtCodes, load_study
from training.teacher import TEACHER_WIDTH

STAGE = "vq"
STILL_SHARE = 0.4  # of the steps: before the study's codes move
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

    @property
    def heads(self) -> nn.ModuleDict:
        """What is not shipped."""
        return nn.ModuleDict({"head": self.head, "pupil": self.pupil})

    def begin(self, encoder: EncoderTraining, study: TaughtCodes) -> None:
        """Take over the encoder's weights and the study's codes and head. Raises CheckpointError when widths differ."""
        heard = encoder.whisper.encoder.state_dict()
        ours = self.tokenizer.state_dict()
        # The encoder's last LayerNorm has no place here, the codebook none there.
        take_over(self.tokenizer, {name: heard.get(name, value) for name, value in ours.items()}, "the encoder")
        take_over(self.book, study.book.state_dict(), "the study's codebook")
        take_over(self.head, study.head.state_dict(), "the study's head")

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The named losses of a step, weighted."""
        device = device_of(self)
        batch = batch.to(device)
        with fast_products(device):
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
    with whole_file(root / VQ_TOKENIZER / SINGLE_FILE) as partial:
        write_safetensors(partial, source, {"format": "pt"})
    write_heads(root, STAGE, training.heads)


def read_vq(root: Path, training: VQTraining) -> None:
    """Begin with the weights of a checkpoint folder. Raises CheckpointError or WeightsError."""
    folder = root / VQ_TOKENIZER
    take_over(training.tokenizer, load_vq(folder, "cpu").state_dict(), str(folder))
    stored = encoder_source(folder)
    book = {"count": stored["ema_count"], "total": stored["ema_weight"]}
    averages = {name: item.read().float() for name, item in book.items()} | {"ready": torch.ones((), dtype=torch.long)}
    take_over(training.book, averages, str(folder))
    read_heads(root, STAGE, training.heads)


def main() -> None:
    """Train the tokenizer."""
    parser = trainer_parser(main.__doc__, steps=2000, batch=12, rate=1e-3)
    parser.add_argument("--study", type=Path, required=True, help="run of the study, whose codes are learned")
    options = parser.parse_args()
    configs = trainer_configs()
    recipe = Recipe(continuous_steps=0, still_steps=round(STILL_SHARE * options.steps))
    training = VQTraining(configs.vq, configs.vq_features, configs.flow, recipe)
    training.guide = (load_study(options.study, configs).to(options.device),)
    if options.start is not None:
        read_vq(options.start, training)
    else:
        encoder = EncoderTraining(configs.whisper, configs.whisper_features)
        read_encoder(options.checkpoint, encoder)
        training.begin(encoder, training.guide[0])
    hearing = Hearing(*taught_clips(options.corpus), configs.vq_features, configs, seed=1)
    data = Ahead(lambda step: hearing.batch(step, options.batch), options.steps, options.workers)

    def losses(step: int) -> dict[str, Tensor]:
        return training.losses(data(step), step)

    progress = Loop(STAGE, training, losses, plan_of(options), options.run).run()
    averaged_weights(options.run, training)
    write_configs(options.checkpoint)
    write_vq(options.checkpoint, training)
    leave(STAGE, progress, options.steps)


if __name__ == "__main__":
    main()
