"""`kimia transcribe`: write down what is said in audio files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from kimia.cli.arguments import add_model, load_model
from kimia.errors import AudioError, ConversationError, KimiaError

if TYPE_CHECKING:
    from kimia.pipeline import KimiAudio

INSTRUCTION = "Please transcribe the following audio:"  # the release's own example prompt
EPILOG = """examples:
  kimia transcribe --model DIR call.wav
  kimia transcribe --model DIR --json calls/*.wav > calls.jsonl
  kimia transcribe --model DIR --instruction "请将音频内容转换为文字。" call.wav

A file that cannot be read is reported and skipped; the exit code is then 1.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia transcribe`."""
    parser.epilog = EPILOG
    parser.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3; any rate from 8 to 192 kHz")
    parser.add_argument("--instruction", default=INSTRUCTION, help=f"text before the audio (default: {INSTRUCTION!r})")
    parser.add_argument("--max-new-tokens", type=int, default=-1, metavar="N", help="longest transcript in tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Transcribe the files one after the other; only the parts of the model that make text are loaded."""
    model = load_model(args, load_detokenizer=False, text_only=True)
    failed = 0
    for file in tqdm(args.files, unit="file", file=sys.stderr, disable=None if len(args.files) > 1 else True):
        try:
            text = _transcribe(model, file, args)
        except (AudioError, ConversationError) as error:
            failed += 1
            tqdm.write(f"error: {_complaint(file, error)}", file=sys.stderr)
            continue
        tqdm.write(_line(file, text, args), file=sys.stdout)
        sys.stdout.flush()
    return 1 if failed else 0


def _transcribe(model: KimiAudio, file: str, args: argparse.Namespace) -> str:
    messages: Sequence[dict[str, str]] = (
        {"role": "user", "message_type": "text", "content": args.instruction},
        {"role": "user", "message_type": "audio", "content": file},
    )
    return model.generate(messages, "text", max_new_tokens=args.max_new_tokens, preset="low-latency")[1]


def _complaint(file: str, error: KimiaError) -> str:
    """What is wrong with the file, without the index of a message that the user never wrote."""
    if isinstance(error.__cause__, AudioError):
        return str(error.__cause__)
    return f"{file}: {error.rule if isinstance(error, ConversationError) else error}"


def _line(file: str, text: str, args: argparse.Namespace) -> str:
    if args.json:
        return json.dumps({"file": file, "text": text}, ensure_ascii=False)
    return f"{file}\t{text}" if len(args.files) > 1 else text
