"""The words that every trainer understands."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from training.loop import Plan


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
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which the run ends, resumable")
    return parser


def plan_of(options: argparse.Namespace, clip: float = 1.0) -> Plan:
    """The plan that a trainer was told."""
    return Plan(options.steps, options.rate, clip=clip, seconds=options.seconds)
