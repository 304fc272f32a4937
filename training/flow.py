"""The flow-matching model, trained as it is used: chunk after chunk, behind a prefix of what was said before.

    python -m training.flow --corpus FOLDER --run FOLDER --checkpoint FOLDER

A clip is cut into chunks as the streaming presets cut it. Each chunk is solved with its look-ahead and the keys and
values of the chunks before it; then its clean mel is committed at time 999, as after a solve. Some codes are wrong
and the committed mel is a little noisy, as both will be when the language model has chosen the codes.

Shapes: B clips, n tokens, T = 4 n frames, M mel bins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.checkpoint import ARCHIVE, VQ_TOKENIZER, Stored
from kimia.model.chunking import pushes
from kimia.model.config import FlowConfig
from kimia.model.dit import Chunk, DiT, Prefix, load_dit, rotary
from kimia.model.flow import COMMIT_TIME, TIME_SCALE
from kimia.model.layout import FLOW_PREFIX
from kimia.model.schedule import SCHEDULES, Schedule
from kimia.model.vq import load_vq
from kimia.model.writing import write_torch
from training.ahead import Ahead
from training.config import trainer_configs, write_configs
from training.corpus import load_clips
from training.heads import take_over
from training.loop import Loop, averaged_weights, fast_products
from training.options import leave, plan_of, trainer_parser
from training.speaking import FRAMES_PER_TOKEN, Speaking, Spoken
from training.voices import SPEAKER

FOLDER = "audio_detokenizer"  # in a checkpoint


@dataclass(frozen=True)
class Recipe:
    """How speech is cut and disturbed."""

    presets: float = 0.5  # share of the steps cut exactly as a preset cuts; the others at random:
    commits: tuple[int, int] = (6, 37)  # tokens that a chunk commits, drawn between: both presets' sizes
    look_aheads: tuple[int, ...] = (4, 12)  # of the presets
    wrong_codes: float = 0.04  # share replaced by any code
    commit_noise: float = 0.1  # standard deviation on the committed mel


@dataclass(frozen=True)
class _Layers(Prefix):
    """Keys and values in one tensor a layer: they are written in place, which a gradient forbids for a shared one."""

    @property
    def frames(self) -> int:
        """Mel frames remembered."""
        return int(self.keys[0].shape[2])


def _layers(held: Sequence[Tensor], others: Sequence[Tensor]) -> _Layers:
    return _Layers(tuple(held), tuple(others))  # type: ignore[arg-type]  # iterated layer by layer, as a stack is


def _roomy(held: Tensor, frames: int) -> Tensor:
    return F.pad(held, (0, 0, 0, frames))


class FlowTraining(nn.Module):
    """The velocity field and its losses."""

    def __init__(self, config: FlowConfig, recipe: Recipe = Recipe()) -> None:
        super().__init__()
        self.recipe = recipe
        self.dit = DiT(config)
        _begin(self.dit)

    # ---- one chunk ----

    def empty(self, batch: int) -> _Layers:
        """The prefix of clips that have said nothing."""
        nothing = self.dit.empty_prefix(batch)
        return _layers(list(nothing.keys), list(nothing.values))

    def chunk(self, codes: Tensor, start: int, prefix: _Layers) -> Chunk:
        """What a chunk of codes (B, n) needs, as `DiT.chunk` gathers it, with a cache that gradients pass."""
        frames = codes.shape[1] * FRAMES_PER_TOKEN
        room = _layers([_roomy(k, frames) for k in prefix.keys], [_roomy(v, frames) for v in prefix.values])
        rotation = rotary(self.dit.config, start, frames, self.dit.device)
        return Chunk(self.dit.semantic_token_embedding(codes), FRAMES_PER_TOKEN, rotation, None, room)

    def matching(self, mel: Tensor, chunk: Chunk, generator: torch.Generator) -> Tensor:
        """Squared error of the velocity at a random time, of clean mel (B, T, M)."""
        noise = torch.randn(mel.shape, generator=generator).to(mel.device)
        index = torch.randint(TIME_SCALE, (len(mel),), generator=generator).to(mel.device)
        time = (index / TIME_SCALE)[:, None, None]
        with fast_products(mel.device):
            velocity = self.dit((1 - time) * noise + time * mel, self.dit.t_embedder(index), chunk).float()
        error: Tensor = velocity - (mel - noise)
        return error.square()

    def committed(self, mel: Tensor, codes: Tensor, start: int, prefix: _Layers) -> _Layers:
        """The prefix with a finished chunk's keys and values behind it."""
        chunk = self.chunk(codes, start, prefix)
        with fast_products(mel.device):
            self.dit(mel, self.dit.embed_times((COMMIT_TIME,)), chunk)
        return _layers(list(chunk.cache.keys), list(chunk.cache.values))

    # ---- whole clips ----

    def losses(self, spoken: Sequence[Spoken], step: int) -> dict[str, Tensor]:
        """The loss of a step's clips, cut to the shortest."""
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        tokens = min(len(one.codes) for one in spoken)
        mel = torch.stack([one.mel[: tokens * FRAMES_PER_TOKEN] for one in spoken])
        codes = self._disturbed(torch.stack([one.codes[:tokens] for one in spoken]), generator)
        mel, codes = mel.to(self.dit.device), codes.to(self.dit.device)
        prefix, squares = self.empty(len(spoken)), []
        for begin, kept, end in cuts(rng, tokens, self.recipe):
            position = begin * FRAMES_PER_TOKEN
            inside = slice(position, end * FRAMES_PER_TOKEN)
            chunk = self.chunk(codes[:, begin:end], position, prefix)
            squares.append(self.matching(mel[:, inside], chunk, generator).flatten())
            if kept < tokens:
                clean = mel[:, position : kept * FRAMES_PER_TOKEN]
                noise = torch.randn(clean.shape, generator=generator).to(clean.device)
                noisy = clean + self.recipe.commit_noise * noise
                prefix = self.committed(noisy, codes[:, begin:kept], position, prefix)
        return {"velocity": torch.cat(squares).mean()}

    def _disturbed(self, codes: Tensor, generator: torch.Generator) -> Tensor:
        wrong = torch.rand(codes.shape, generator=generator) < self.recipe.wrong_codes
        return torch.where(wrong, torch.randint(self.dit.config.audio_codes, codes.shape, generator=generator), codes)


def cuts(rng: random.Random, tokens: int, recipe: Recipe) -> Iterator[tuple[int, int, int]]:
    """Chunks as they are pushed: begin, end of what is committed, end of what is solved (all in tokens)."""
    if rng.random() < recipe.presets:
        yield from _as_pushed(rng.choice(tuple(SCHEDULES.values())), tokens)
        return
    begin, look_ahead = 0, rng.choice(recipe.look_aheads)
    while True:
        kept = begin + rng.randint(*recipe.commits)
        if kept + look_ahead >= tokens:  # the final push
            yield begin, tokens, tokens
            return
        yield begin, kept, kept + look_ahead
        begin = kept


@torch.no_grad()
def _begin(dit: DiT) -> None:
    """Starting weights: every block begins as the identity (its gates are zero), the velocity as zero."""
    for layer in dit.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(dit.semantic_token_embedding.weight, std=0.5)
    gates = [
        layer for name, layer in dit.named_modules() if name.endswith(("adaLN_modulation.1", "final_layer.linear"))
    ]
    for gate in gates:
        assert isinstance(gate, nn.Linear)
        nn.init.zeros_(gate.weight)


def _as_pushed(schedule: Schedule, tokens: int) -> Iterator[tuple[int, int, int]]:
    begin = end = 0
    for push in pushes(schedule, range(tokens)):
        end += len(push.tokens)
        kept = tokens if push.final else end - schedule.look_ahead
        yield begin, kept, end
        begin = kept


def write_flow(root: Path, training: FlowTraining) -> None:
    """Write the flow model's weights into a checkpoint folder that has its config files, in the released layout."""
    source = {
        FLOW_PREFIX + name: Stored(tuple(value.shape), "float32", lambda value=value: value)  # type: ignore[misc]
        for name, value in training.dit.state_dict().items()
    }
    write_torch(root / FOLDER / ARCHIVE, "state_dict", source)


def read_flow(root: Path, training: FlowTraining) -> None:
    """Begin with the weights of a checkpoint folder. Raises CheckpointError or WeightsError."""
    loaded = load_dit(root / FOLDER, "cpu", torch.float32)
    take_over(training.dit, loaded.state_dict(), str(root / FOLDER))


def main() -> None:
    """Train the flow model on the codes of the checkpoint's tokenizer."""
    options = trainer_parser(main.__doc__, steps=5000, batch=16, rate=1e-3).parse_args()
    configs = trainer_configs()
    clips = load_clips(options.corpus, "train", SPEAKER.name)
    tokenizer = load_vq(options.checkpoint / VQ_TOKENIZER, "cpu")
    speaking = Speaking(clips, tokenizer, configs.flow, configs.vocoder, seed=3)
    training = FlowTraining(configs.flow)
    if options.start is not None:
        read_flow(options.start, training)

    # The tokenizer that codes the clips stays on the CPU, where the data are made
    data = Ahead(lambda step: speaking.batch(step, options.batch), options.steps, options.workers)

    def losses(step: int) -> dict[str, Tensor]:
        return training.losses(data(step), step)

    progress = Loop("flow", training, losses, plan_of(options), options.run).run()
    averaged_weights(options.run, training)
    write_configs(options.checkpoint)
    write_flow(options.checkpoint, training)
    leave("flow", progress, options.steps)


if __name__ == "__main__":
    main()
