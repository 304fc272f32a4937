"""How an answer is to be made: a turn's options as the model library knows them, with its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from kimia.errors import ParameterError
from kimia.model.conversation import OutputType
from kimia.model.philox import check_seed
from kimia.model.presets import Preset, find_preset
from kimia.model.sampler import ARGUMENT_NAMES, Sampling
from kimia.model.text import TextTokenizer
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_BOTH, OUTPUT_TYPE_TEXT, OUTPUT_TYPE_UNSPECIFIED, TurnOptions
from kimia.v1.turn_pb2 import Turn

OUTPUT_TYPES: dict[int, OutputType] = {
    OUTPUT_TYPE_UNSPECIFIED: "both",
    OUTPUT_TYPE_BOTH: "both",
    OUTPUT_TYPE_TEXT: "text",
}


@dataclass(frozen=True)
class AnswerOptions:
    """What a turn asks for."""

    output_type: OutputType
    preset: Preset
    limit: int | None  # steps; None: no limit of the caller's
    sampling: Sampling
    seed: int
    say: tuple[int, ...] | None  # text ids to be said


def read_options(turn: Turn, tokenizer: TextTokenizer) -> AnswerOptions:
    """The options of a turn. Raises ParameterError outside their domains."""
    options = turn.options
    if options.output_type not in OUTPUT_TYPES:
        raise ParameterError(f"output_type must be TEXT or BOTH, got {options.output_type}")
    return AnswerOptions(
        output_type=OUTPUT_TYPES[options.output_type],
        preset=find_preset(options.preset),
        limit=_limit(options),
        sampling=read_sampling(options),
        seed=check_seed(turn.seed),
        say=_say(turn, tokenizer),
    )


def read_sampling(options: TurnOptions) -> Sampling:
    """How both tracks are drawn; what is unset keeps the model's default. Raises ParameterError."""
    arguments: dict[str, float] = {}
    for name, track in (("text", options.text), ("audio", options.audio)):
        for field, end in ARGUMENT_NAMES.items():
            if track.HasField(field):  # type: ignore[arg-type]  # the same names as in the contract
                arguments[f"{name}_{end}"] = getattr(track, field)
    return Sampling.from_arguments(arguments)


def _limit(options: TurnOptions) -> int | None:
    if not options.HasField("max_new_tokens"):
        return None
    if options.max_new_tokens < 1:
        raise ParameterError("max_new_tokens must be at least 1; leave it out for no limit")
    return options.max_new_tokens


def _say(turn: Turn, tokenizer: TextTokenizer) -> tuple[int, ...] | None:
    if not turn.HasField("say"):
        return None
    ids = tuple(tokenizer.encode(turn.say))
    if not ids:
        raise ParameterError("there is nothing to say: the text is empty")
    return ids
