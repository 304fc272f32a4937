"""`kimia explain`: the prompt of a conversation as a table, both tracks side by side.

Reads only the configs, the text tokenizer and the VQ tokenizer, so it answers at once even for the 7B model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kimia.cli.arguments import add_chat, add_model, chat_messages, model_location
from kimia.errors import ContextLengthError

if TYPE_CHECKING:
    from kimia.model.config import LMConfig
    from kimia.model.prompt import Prompt
    from kimia.model.text import TextTokenizer

BLANK = "."
SHOWN = 3  # positions shown at either end of a long run of codes
EPILOG = """examples:
  kimia explain --model DIR chat.json
  kimia explain --model DIR --text "Please transcribe:" --audio call.wav --output text --all

"+feature" marks positions that take a continuous feature (and the factor sqrt 2). Blanks are shown as ".".
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia explain`."""
    parser.epilog = EPILOG
    add_chat(parser)
    parser.add_argument("--all", action="store_true", help="show every position, not only the ends of long runs")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    add_model(parser, device=False)


@dataclass(frozen=True)
class Line:
    """One position of the prompt."""

    position: int
    message: int | None  # None: the start of the answer
    role: str
    part: str
    audio_id: int
    audio: str
    text_id: int
    text: str
    feature: bool


def run(args: argparse.Namespace) -> int:
    """Lay the conversation out and print it with its lengths and budgets."""
    messages = chat_messages(args)
    prompt, config, tokenizer = _prompt(messages, args)
    lines = list(_lines(prompt, config, tokenizer))
    totals = _totals(prompt, config, args.output)
    if args.json:
        print(json.dumps({"positions": [asdict(line) for line in lines], "totals": totals}, ensure_ascii=False))
        return 0
    for row in _table(lines, everything=args.all):
        print(row)
    print()
    for name, value in totals.items():
        print(f"{name.replace('_', ' '):>24}  {value}")
    return 0


def _prompt(messages: Sequence[Any], args: argparse.Namespace) -> tuple[Prompt, LMConfig, TextTokenizer]:
    from kimia.model.checkpoint import open_checkpoint
    from kimia.model.consistency import read_configs
    from kimia.model.conversation import parse_conversation
    from kimia.model.prompt import build_prompt
    from kimia.model.text import TextTokenizer
    from kimia.model.vq import load_vq
    from kimia.pipeline import CodesOnly, load_clips

    checkpoint = open_checkpoint(model_location(args), args.vq_tokenizer, detokenizer=False)
    configs = read_configs(checkpoint, detokenizer=False)
    tokenizer = TextTokenizer.load(checkpoint.root, configs.lm)
    parsed = parse_conversation(messages, configs.lm)
    waves = load_clips(parsed, configs.vq_features.sample_rate)
    codes = load_vq(checkpoint.vq_tokenizer, "cpu").encode(list(waves.values())) if waves else []
    clips = {index: CodesOnly(tuple(clip.tolist())) for index, clip in zip(waves, codes, strict=True)}
    return build_prompt(parsed, clips, args.output, configs.lm, tokenizer), configs.lm, tokenizer


def _lines(prompt: Prompt, config: LMConfig, tokenizer: TextTokenizer) -> Iterator[Line]:
    for span in prompt.spans:
        for position in range(span.begin, span.begin + span.length):
            audio_id, text_id = prompt.audio_ids[position], prompt.text_ids[position]
            yield Line(
                position,
                span.message,
                span.role,
                span.part,
                audio_id,
                _name(audio_id, config, tokenizer),
                text_id,
                _name(text_id, config, tokenizer),
                span.part == "codes",
            )


def _name(token: int, config: LMConfig, tokenizer: TextTokenizer) -> str:
    """How an id is shown: a code by its number, the blank as a dot, text in quotes, specials by name."""
    if token >= config.token_offset:
        return f"code {token - config.token_offset}"
    if token == tokenizer.special.blank:
        return BLANK
    text = tokenizer.decode([token])
    return text if token >= tokenizer.base else repr(text)


def _table(lines: Sequence[Line], *, everything: bool) -> Iterator[str]:
    yield f"{'pos':>5}  {'msg':>3}  {'role':<9}  {'part':<13}  {'audio track':<36}  {'text track'}"
    for line in lines if everything else _shortened(lines):
        if line is None:
            yield f"{'...':>5}"
            continue
        message = "" if line.message is None else str(line.message)
        audio = line.audio + (" +feature" if line.feature else "")
        yield f"{line.position:>5}  {message:>3}  {line.role:<9}  {line.part:<13}  {audio:<36}  {line.text}".rstrip()


def _shortened(lines: Sequence[Line]) -> Iterator[Line | None]:
    """The lines, with None in place of the middle of every long run that has only codes to show."""
    for (_, _, silent), group in groupby(lines, key=lambda line: (line.message, line.part, line.text == BLANK)):
        run = list(group)
        if silent and len(run) > 2 * SHOWN + 1:
            yield from (*run[:SHOWN], None, *run[-SHOWN:])
        else:
            yield from run


def _totals(prompt: Prompt, config: LMConfig, output: Any) -> dict[str, Any]:
    from kimia.model.prompt import TOKEN_RATE, steps_allowed

    segments = [
        f"{length} codes ({length / TOKEN_RATE:.2f} s) from position {begin}" for begin, length in prompt.segments
    ]
    try:
        budget: Any = steps_allowed(len(prompt), output, None, config)
    except ContextLengthError as error:
        budget = f"none: {error}"
    return {
        "prompt_positions": len(prompt),
        "model_positions": config.max_positions,
        "audio_segments": segments or "none",
        "audio_delay_steps": config.audio_delay,
        "output": output,
        "steps_allowed": budget,
        "steps_allowed_upstream": steps_allowed(len(prompt), output, None, config, "upstream"),
    }
