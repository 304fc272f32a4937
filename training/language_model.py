"""The language model: text and audio answers side by side, in exactly the layout that generation uses.

    python -m training.language_model --corpus FOLDER --run FOLDER --checkpoint FOLDER

The prompt is the one that serving builds. Behind it each step has a text id and an audio id, the audio `audio_delay`
steps late; only what is drawn when generating is a target: the text with its end, the codes with theirs. Some codes
that the model reads are wrong, because those that it will read back are its own.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.errors import ConversationError, NumericsError
from kimia.model import layout
from kimia.model.checkpoint import SHARD_INDEX, Stored, open_checkpoint
from kimia.model.config import LMConfig
from kimia.model.conversation import Message
from kimia.model.encode import AudioEncoder
from kimia.model.lm import DualTrackLM, Row, load_lm, stack
from kimia.model.prompt import Encoded, build_prompt
from kimia.model.text import TextTokenizer
from kimia.model.writing import write_safetensors
from training.ahead import Ahead
from training.config import trainer_configs
from training.heads import take_over
from training.loop import Loop, averaged_weights, fast_products
from training.options import deadline, leave, plan_of, trainer_parser, unfinished
from training.tasks import Example, Part
from training.voices import Cache

WRONG_CODES = 0.06  # share of the codes read that are replaced by any code


@dataclass(frozen=True)
class Lesson:
    """One conversation with its answer, as ids."""

    row: Row  # prompt and answer, without the last step
    text_targets: tuple[int, ...]  # of each position, -1 where nothing is learned
    audio_targets: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.row.audio_ids), len(self.row.text_ids), len(self.text_targets), len(self.audio_targets)}
        if len(lengths) != 1:
            raise ConversationError(f"ids and targets of a lesson differ in length: {sorted(lengths)}")


def message(part: Part, clip: Encoded | None, config: LMConfig) -> Message:
    """A part as the prompt takes it; an assistant's speech is history by its codes."""
    if part.kind == "text":
        return Message(part.role, "text", text=part.text)
    if part.role == "assistant":
        codes = () if clip is None else tuple(config.token_offset + code for code in clip.codes)
        return Message("assistant", "audio-text", text=part.text, audio_tokens=codes)
    return Message("user", "audio", audio=b"encoded")


def lesson(
    example: Example, clips: Mapping[int, Encoded], answer: Sequence[int], config: LMConfig, tokenizer: TextTokenizer
) -> Lesson:
    """Lay out an example; `clips` by index of the part, `answer` the codes of a spoken answer.

    Raises ConversationError when the answer's codes do not match what the example wants, or its text outlasts them.
    """
    if example.spoken != bool(answer):
        raise ConversationError(f"a {example.task} example has {len(answer)} codes to say, spoken={example.spoken}")
    messages = [message(part, clips.get(index), config) for index, part in enumerate(example.parts)]
    wanted = "both" if example.spoken else "text"
    prompt = build_prompt(messages, clips, wanted, config, tokenizer)  # type: ignore[arg-type]
    text, audio = _tracks(tokenizer.encode(example.answer), answer, config, tokenizer)
    silent = [-1] * (len(prompt.audio_ids) - 1)
    blank = tokenizer.special.blank
    row = Row(
        audio_ids=[*prompt.audio_ids, *(blank if index < 0 else index for index in audio[:-1])],
        text_ids=[*prompt.text_ids, *(blank if index < 0 else index for index in text[:-1])],
        segments=prompt.segments,
        features=prompt.features,
    )
    return Lesson(row, (*silent, *text), (*silent, *audio))


def _tracks(
    ids: Sequence[int], codes: Sequence[int], config: LMConfig, tokenizer: TextTokenizer
) -> tuple[list[int], list[int]]:
    """Text and audio of every answering step; -1 where generation forces a blank."""
    special = tokenizer.special
    text = [*ids, special.text_eos]
    audio: list[int] = []
    if codes:
        audio = [-1] * config.audio_delay + [config.token_offset + code for code in codes] + [special.msg_end]
        if len(text) > len(audio):
            raise ConversationError(f"the answer's {len(ids)} text tokens outlast its {len(codes)} codes")
    steps = max(len(text), len(audio))
    return text + [-1] * (steps - len(text)), audio + [-1] * (steps - len(audio))


def disturbed(given: Lesson, config: LMConfig, generator: torch.Generator, share: float = WRONG_CODES) -> Lesson:
    """The same lesson, some of the codes that are read replaced; the targets stay right."""
    ids = torch.tensor(given.row.audio_ids)
    wrong = (ids >= config.token_offset) & (torch.rand(ids.shape, generator=generator) < share)
    others = torch.randint(config.token_offset, config.vocab_size, ids.shape, generator=generator)
    return replace(given, row=replace(given.row, audio_ids=torch.where(wrong, others, ids).tolist()))


class LanguageTraining(nn.Module):
    """The language model and its losses."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.lm = DualTrackLM(config)
        _begin(self.lm)

    def losses(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        """Cross entropy per target of either track."""
        with fast_products(self.lm.device):
            found = self.lm(stack([one.row for one in lessons], self.lm.device))
        return {
            "text": _cross_entropy(found.text_logits, [one.text_targets for one in lessons]),
            "audio": _cross_entropy(found.audio_logits, [one.audio_targets for one in lessons]),
        }


def _cross_entropy(logits: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Mean over all targets of (B, T, V); zero without any. Positions without a target cost nothing."""
    length = logits.shape[1]
    padded = torch.tensor([[*row, *[-1] * (length - len(row))] for row in targets], device=logits.device)
    wanted = padded >= 0
    if not wanted.any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits[wanted].float(), padded[wanted])


@torch.no_grad()
def _begin(lm: DualTrackLM) -> None:
    """Starting weights: normal of 0.02, what is added to the residual stream smaller by its depth."""
    depth = lm.config.layers + lm.config.mimo_layers
    for name, parameter in lm.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def check_finite(lm: DualTrackLM) -> None:
    """Refuse to ship a model with weights that are not finite. Raises NumericsError that names them."""
    broken = [name for name, value in lm.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise NumericsError(f"not finite: {', '.join(broken[:5])}; train again from an earlier state")


# ---- shipping ---------------------------------------------------------------------------------------------------


def shards(config: LMConfig) -> dict[str, list[str]]:
    """File name -> tensor names, as irregular as the release's: one file a layer, the adaptor's, one for the rest."""
    groups = [list(layout.decoder_layer(config, prefix)) for prefix in layout.layer_prefixes(config)]
    groups.append(list(layout.adaptor(config)))
    names = [f"model-{number}-of-{len(groups)}.safetensors" for number in range(1, len(groups) + 1)]
    last = len(groups) + 1
    rest = {f"model-{last}-of-{last}.safetensors": list(layout.embeddings_and_heads(config))}
    return dict(zip(names, groups, strict=True)) | rest


def write_language_model(root: Path, training: LanguageTraining) -> None:
    """Write the language model's shards and their index, bfloat16, into a folder that has its config files.

    Raises NumericsError when a weight is not finite.
    """
    check_finite(training.lm)
    tensors = training.lm.state_dict()
    files = shards(training.lm.config)
    for file, names in files.items():
        source = {
            name: Stored(tuple(tensors[name].shape), "bfloat16", lambda name=name: tensors[name])  # type: ignore[misc]
            for name in names
        }
        write_safetensors(root / file, source, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(2 * tensor.numel() for tensor in tensors.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (root / SHARD_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_language_model(root: Path, training: LanguageTraining) -> None:
    """Begin with the weights of a checkpoint folder. Raises CheckpointError or WeightsError."""
    loaded = load_lm(root, device="cpu", dtype=torch.float32)
    take_over(training.lm, loaded.state_dict(), str(root))


def main() -> None:
    """Make lessons with the checkpoint's encoders, then train the language model on them."""
    from training.classroom import Classroom, Lessons, make_shards  # it needs this module

    parser = trainer_parser(main.__doc__, steps=7000, batch=16, rate=1e-3)
    parser.add_argument("--shards", type=int, default=20, help="of lessons")
    parser.add_argument("--shard-size", type=int, default=500, help="lessons")
    options = parser.parse_args()
    until = deadline(options)
    root, config = options.checkpoint, trainer_configs().lm
    encoder = AudioEncoder.load(open_checkpoint(root), config.adaptor_input_dim, "cpu", torch.float32)
    classroom = Classroom(encoder, TextTokenizer.load(root, config), config, Cache(options.corpus))
    paths = [options.run / "lessons" / f"{number:04}.pt" for number in range(options.shards)]
    if not make_shards(classroom, paths, options.shard_size, options.workers, until):
        unfinished(f"lessons: {sum(path.exists() for path in paths)} of {len(paths)} shards are made")
    lessons, training = Lessons(paths, seed=5), LanguageTraining(config)
    if options.start is not None:
        read_language_model(options.start, training)

    def batch(step: int) -> list[Lesson]:
        generator = torch.Generator().manual_seed(step)
        return [disturbed(one, config, generator) for one in lessons.batch(step, options.batch)]

    data = Ahead(batch, options.steps, options.workers)
    plan = replace(plan_of(options), seconds=until - time.monotonic())
    progress = Loop("language model", training, lambda step: training.losses(data(step)), plan, options.run).run()
    averaged_weights(options.run, training)
    write_language_model(root, training)
    leave("language model", progress, options.steps)


if __name__ == "__main__":
    main()
