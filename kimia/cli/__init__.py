"""The `kimia` command. Each command is a module of this package, imported only when it is called.

A command module has `configure(parser)`, which adds its arguments, and `run(args) -> int`, which returns the exit code:
0 done, 1 a kimia error (one line on stderr, no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from kimia.errors import KimiaError

COMMANDS = {
    "generate": "answer a conversation in text and speech",
    "transcribe": "write down what is said in audio files",
    "explain": "show the prompt of a conversation as a table, without running the model",
    "checkpoint": "create, inspect or convert a model folder",
    "verify": "compare this installation with golden data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    try:
        return int(args.run(args))
    except KimiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kimia",
        description="Kimi-Audio: speech and text in, speech and text out.",
        epilog="Each command explains itself: kimia generate --help",
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in arguments[:1]:  # only the called command's module (and what it needs) is imported
            module = importlib.import_module(f"kimia.cli.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)
