"""`kimia talk`: one turn through the running service, and where its time went."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia.cli.arguments import add_sampling, sampling_options
from kimia.cli.service import add_server, check_writable, open_client, write_wav
from kimia.cli.waterfall import Waterfall, as_text, draw_waterfall, waterfall
from kimia.client import Answer, AudioChunk, TextDelta, TurnDone
from kimia.errors import ParameterError

if TYPE_CHECKING:
    from kimia.client import Kimia, Turn

EPILOG = """examples:
  kimia talk question.wav --out answer.wav
  kimia talk --text "Please transcribe the following audio:" call.wav --output text
  kimia talk question.wav --session monday --waterfall turn.svg
  kimia talk --say "Your order is on its way." --out sentence.wav

The answer's text goes to stdout, where the time went to stderr. A session remembers its turns; without one every
turn is a conversation of its own.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia talk`."""
    parser.epilog = EPILOG
    group = parser.add_argument_group("conversation")
    group.add_argument("files", nargs="*", metavar="FILE", help="what the user says: WAV, FLAC, OGG or MP3")
    group.add_argument("--text", action="append", default=[], help="what the user writes, before the files")
    group.add_argument("--say", metavar="TEXT", help="speak this instead of answering")
    group.add_argument("--session", default="", metavar="ID", help="go on with this session, or begin it")
    group.add_argument("--output", choices=("text", "both"), default="both", help="text, or text and speech (default)")
    group.add_argument("--out", type=Path, metavar="FILE.wav", help="write the spoken answer here")
    group.add_argument("--waterfall", type=Path, metavar="FILE.svg", help="draw where the time went (.svg or .png)")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    group.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="chunk schedule: low-latency, upstream, or one that the service was started with (default: the service's)",
    )
    add_server(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, print the answer as it comes, then the waterfall."""
    check_arguments(args)
    with open_client(args) as kimia:
        turn = _turn(kimia, args)
        try:
            answer = _follow(turn, args)
        finally:  # a turn that broke off too: what was heard is there
            _keep(turn, args.out)
    fall = waterfall(answer.latency, answer.times)
    if args.waterfall:
        draw_waterfall(fall, _summary(answer), args.waterfall)
    if args.json:
        print(json.dumps(_report(answer), ensure_ascii=False))
    _tell(answer, fall)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse before anything is sent what cannot work. Raises ParameterError."""
    if not args.files and not args.text and args.say is None:
        raise ParameterError("nothing to answer: give FILE, --text TEXT or --say TEXT")
    for path in (args.out, args.waterfall):
        if path is not None:
            check_writable(path)
    if args.out and args.output == "text":
        raise ParameterError("--out needs speech: leave out --output text")
    if args.out and args.out.suffix.lower() != ".wav":
        raise ParameterError(f"{args.out}: speech is written as .wav")
    if args.out and any(Path(file).exists() and args.out.exists() and args.out.samefile(file) for file in args.files):
        raise ParameterError(f"{args.out}: is part of the question; write the answer elsewhere")
    if args.waterfall:
        from kimia.cli.draw import check_format

        check_format(args.waterfall)


def _turn(kimia: Kimia, args: argparse.Namespace) -> Turn:
    messages = [{"role": "user", "message_type": "text", "content": text} for text in args.text]
    messages += [{"role": "user", "message_type": "audio", "content": file} for file in args.files]
    settings: dict[str, Any] = {**sampling_options(args), "preset": args.preset, "session": args.session}
    if args.say is not None:
        return kimia.say(args.say, messages, **settings)
    return kimia.generate(messages, args.output, **settings)


def _follow(turn: Turn, args: argparse.Namespace) -> Answer:
    """Print the text as it comes."""
    heard = 0
    for event in turn:
        if isinstance(event, TextDelta) and not args.json:
            print(event.text, end="", flush=True)
        elif isinstance(event, AudioChunk) and turn.progress.started and sys.stderr.isatty():
            heard += len(event.data)
            seconds = heard / 2 / turn.progress.started.sample_rate
            print(f"\r{seconds:6.1f} s of speech ", end="", file=sys.stderr, flush=True)
    if not args.json:
        print(flush=True)
    return turn.progress.answer()


def _keep(turn: Turn, out: Path | None) -> None:
    """Write what has come of the speech."""
    progress = turn.progress
    done = isinstance(progress.end, TurnDone)
    if out is None or progress.started is None or not (done or progress.pcm):
        return
    write_wav(out, progress.pcm, progress.started.sample_rate)
    if not done:
        seconds = len(progress.pcm) / 2 / progress.started.sample_rate
        print(f"the turn broke off: {seconds:.2f} s of speech are in {out}", file=sys.stderr)


def _report(answer: Answer) -> dict[str, Any]:
    stages = {stage.stage: {"worker": stage.worker, "take_overs": stage.take_overs} for stage in answer.latency.stages}
    return {
        "text": answer.text,
        "stop": answer.stop,
        "turn": answer.turn_id,
        "session": answer.session_id,
        "seed": answer.seed,
        "audio_seconds": answer.seconds,
        "usage": vars(answer.usage),
        "seconds": {
            "first_text": answer.times.first_text,
            "first_audio": answer.times.first_audio,
            "total": answer.times.total,
        },
        "stages": stages,
    }


def _summary(answer: Answer) -> str:
    spoken = f", {answer.seconds:.2f} s of speech" if answer.seconds else ""
    return f"{answer.usage.prompt_positions} positions in, {answer.usage.steps} steps out{spoken}"


def _tell(answer: Answer, fall: Waterfall) -> None:
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    plain = "utf" not in (sys.stderr.encoding or "").lower()
    print(f"[{_summary(answer)}, stopped by {answer.stop}; seed {answer.seed}]", file=sys.stderr)
    print(as_text(fall, width, plain), file=sys.stderr)
