"""The `kimia` command. Each command is a module of this package, imported only when it is called.

A command module has `configure(parser)`, which adds its arguments, and `run(args) -> int`, which returns the exit code:
0 done, 1 a kimia error (one line on stderr, no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from kimia.errors import KimiaError

COMMANDS = {
    "generate": "answer a conversation in text and speech",
    "transcribe": "write down what is said in audio files",
    "up": "run the whole service on this machine",
    "talk": "one spoken turn through a running service, and where its time went",
    "ps": "what runs in a service, and how full it is",
    "explain": "show the prompt of a conversation as a table, without running the model",
    "checkpoint": "create, inspect or convert a model folder",
    "plan": "how many GPUs so many calls need, with the arithmetic",
    "triton": "write a model repository, so that Triton hosts the encoders and the vocoder",
    "calibrate-flow": "find the cheapest way to synthesise that still sounds alike, on your weights and audio",
    "verify": "compare this installation with golden data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _prepare_streams()
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except KimiaError as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        _discard_output()
        return 1
    except OSError as error:  # a full disk behind stdout, say
        _discard_output()
        return _failed(error)
    return code


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _prepare_streams() -> None:
    """Closed streams swallow what is written to them; characters that a stream cannot encode are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kimia",
        description="Kimi-Audio: speech and text in, speech and text out.",
        epilog="Each command explains itself: kimia generate --help",
    )
    parser.add_argument("--version", action="version", version=f"kimia {_version()}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in arguments[:1]:  # only the called command's module (and what it needs) is imported
            module = importlib.import_module(f"kimia.cli.{name.replace('-', '_')}")
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def _version() -> str:
    try:
        return importlib.metadata.version("kimia")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree that is not installed"
