"""The words that every trainer understands."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

from kimia.pipeline import choose_device
from training.ahead import spare_cores
from training.loop import Plan, Progress

UNFINISHED = os.EX_TEMPFAIL  # exit code of a slice that is over: the same command goes on


def trainer_parser(description: str | None, *, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """A parser with what every trainer is told, and a stage's own defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the run's state; a run that is there goes on"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder that the finished weights are written to"
    )
    parser.add_argument("--start", type=Path, help="checkpoint folder whose weights a new run begins with")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    add_slice(parser)
    add_device(parser)
    return parser


def add_slice(parser: argparse.ArgumentParser, *, workers: int | None = None) -> None:
    """How long the command may take, and with how many helpers: by default as many as a trainer leaves cores."""
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which the run ends, resumable")
    parser.add_argument(
        "--workers",
        type=int,
        default=spare_cores() if workers is None else workers,
        help="processes that work beside this one; here %(default)s by default",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a stage is trained. Parsing raises ParameterError for a device that is not there."""
    parser.add_argument(
        "--device", type=choose_device, default=choose_device(None), help="default: cuda where there is one"
    )


def plan_of(options: argparse.Namespace, clip: float = 1.0) -> Plan:
    """The plan that a trainer was told."""
    return Plan(options.steps, options.rate, clip=clip, seconds=options.seconds, device=options.device)


def deadline(options: argparse.Namespace) -> float:
    """When the seconds are over, by `time.monotonic`."""
    return time.monotonic() + float(options.seconds)


def leave(name: str, progress: Progress, steps: int) -> None:
    """End the program with UNFINISHED where steps are left."""
    if progress.step < steps:
        unfinished(f"{name}: {progress.step} of {steps} steps are done")


def unfinished(where: str) -> None:
    """End the program: its seconds are over before its work."""
    print(f"{where}; the same command goes on")
    raise SystemExit(UNFINISHED)
