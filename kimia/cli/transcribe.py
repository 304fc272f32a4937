"""`kimia transcribe`: write down what is said in audio files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeAlias

from kimia.cli.arguments import add_model, add_quantize, load_model
from kimia.cli.service import add_server, open_client
from kimia.errors import AudioError, ConversationError, KimiaError, ParameterError, RequestError
from kimia.model.instructions import TRANSCRIBE

Writer: TypeAlias = Callable[[str], str]  # a file's name to what is said in it

PATIENCE = 600.0  # seconds to wait for a free row of a busy service: nobody waits on the line
EPILOG = """examples:
  kimia transcribe --model DIR call.wav
  kimia transcribe --model DIR --json calls/*.wav > calls.jsonl
  kimia transcribe --model DIR --instruction "请将音频内容转换为文字。" call.wav
  kimia transcribe --server localhost:50051 calls/*.wav

With --server a running service does the work, in its batch queue: no model is loaded here.
A file that cannot be read is reported and skipped; the exit code is then 1.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia transcribe`."""
    parser.epilog = EPILOG
    parser.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3; any rate from 8 to 192 kHz")
    parser.add_argument("--instruction", default=TRANSCRIBE, help=f"text before the audio (default: {TRANSCRIBE!r})")
    parser.add_argument("--max-new-tokens", type=int, default=-1, metavar="N", help="longest transcript in tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    add_server(parser, required=False)
    add_model(parser)
    add_quantize(parser)


def run(args: argparse.Namespace) -> int:
    """Transcribe the files one after the other."""
    failed = 0
    with _writer(args) as write:
        for file in _progress(args.files):
            try:
                _print(_line(file, write(file), args), sys.stdout)
            except (AudioError, ConversationError, RequestError) as error:
                failed += 1
                _print(f"error: {_complaint(file, error)}", sys.stderr)
    return 1 if failed else 0


@contextmanager
def _writer(args: argparse.Namespace) -> Iterator[Writer]:
    """Who does it: the service that was named, else the model, of which only what makes text is loaded."""
    options = {"max_new_tokens": args.max_new_tokens, "preset": "low-latency"}
    if args.server:
        if args.device or args.dtype or args.quantize:
            rule = "--device, --dtype and --quantize are the service's own matter; leave them out, or --server"
            raise ParameterError(rule)
        with open_client(args, PATIENCE) as kimia:
            yield lambda file: kimia.transcribe(file, args.instruction, batch=True, **options)
        return
    from kimia.pipeline import check_options

    check_options(max_new_tokens=args.max_new_tokens)
    model = load_model(args, load_detokenizer=False, text_only=True)
    yield lambda file: model.generate(_messages(file, args.instruction), "text", **options)[1]


def _messages(file: str, instruction: str) -> Sequence[dict[str, str]]:
    return (
        {"role": "user", "message_type": "text", "content": instruction},
        {"role": "user", "message_type": "audio", "content": file},
    )


def _progress(files: Sequence[str]) -> Iterable[str]:
    """The files, with a bar for several where the library for it is installed (a client alone has it not)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return files
    bar: Iterable[str] = tqdm(files, unit="file", file=sys.stderr, disable=None if len(files) > 1 else True)
    return bar


def _print(text: str, stream: TextIO) -> None:
    """A line that does not disturb the bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, file=stream, flush=True)
    else:
        tqdm.write(text, file=stream)
        stream.flush()


def _complaint(file: str, error: KimiaError) -> str:
    """What is wrong with the file, without the index of a message that the user never wrote."""
    if isinstance(error.__cause__, AudioError):
        return str(error.__cause__)
    return f"{file}: {error.rule if isinstance(error, AudioError | ConversationError) else error}"


def _line(file: str, text: str, args: argparse.Namespace) -> str:
    if args.json:
        return json.dumps({"file": file, "text": text}, ensure_ascii=False)
    return f"{file}\t{text}" if len(args.files) > 1 else text
