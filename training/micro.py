"""Every stage of the micro checkpoint, one after the other: `python -m training.micro --folder FOLDER`.

A stage that has ended well leaves a file `finished` in its folder and is not run again; delete the folder to train it
anew. With `--seconds` the stages end in time, as for a machine that is lent for minutes, and the same command goes on.
The card's figures take longer than such a slice and cannot be broken off: they are measured without `--seconds` only.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training import corpus, states
from training.options import UNFINISHED

FINISHED = "finished"
RESERVE = 30.0  # seconds of a slice for starting, and for keeping what was done
CORPUS = ("--speaker", "6000", "--callers", "5000", "--test", "200")
TAUGHT = ("--speaker", "2500")  # heard by the encoders: all clips of the speaking voice would outweigh the callers'


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str  # of the module
    arguments: Sequence[object]
    finished: Path  # is there when nothing is left to do


def stages(folder: Path) -> list[Stage]:
    """What is trained, in order, below a folder."""
    sound, checkpoint = folder / "corpus", folder / "checkpoint"

    def trainer(name: str, run: str, *more: object) -> Stage:
        places = ("--corpus", sound, "--run", folder / run, "--checkpoint", checkpoint)
        return Stage(name, (*places, *more), folder / run / FINISHED)

    study = folder / "study"
    return [
        Stage("corpus", ("--out", sound, *CORPUS), sound / corpus.PACKED_INDEX),
        Stage("states", ("--corpus", sound, *TAUGHT), sound / states.FOLDER / FINISHED),
        Stage("study", ("--corpus", sound, "--run", study), study / FINISHED),
        trainer("encoders", "encoder"),
        trainer("vq", "vq", "--study", study),
        trainer("vocoder", "vocoder"),
        trainer("flow", "flow"),
        trainer("language_model", "language_model"),
    ]


def _run(name: str, arguments: Sequence[object]) -> int:
    return subprocess.run([sys.executable, "-m", f"training.{name}", *map(str, arguments)], check=False).returncode


def rebuild(folder: Path, seconds: float, run: Callable[[str, Sequence[object]], int] = _run) -> int:
    """Run every stage that is not finished, for so many seconds. The exit code; 0 when a slice is over."""
    until = time.monotonic() + seconds - (RESERVE if math.isfinite(seconds) else 0.0)
    for stage in stages(folder):
        if stage.finished.exists():
            continue
        left = until - time.monotonic()
        code = run(stage.name, (*stage.arguments, "--seconds", left)) if left > 0 else UNFINISHED
        if code == UNFINISHED:
            print(f"The slice is over in stage {stage.name}; what was done is kept. The same command goes on.")
            return 0
        if code:
            print(f"Stage {stage.name} failed: see above. The same command goes on from the last state that was kept.")
            return code
        stage.finished.touch()
    return _figures(folder, seconds, run)


def _figures(folder: Path, seconds: float, run: Callable[[str, Sequence[object]], int]) -> int:
    places = ("--corpus", folder / "corpus", "--checkpoint", folder / "checkpoint")
    if math.isfinite(seconds):
        words = " ".join(map(str, places))
        print(f"All is trained. The card's figures, which no slice can hold: python -m training.evaluate {words}")
        return 0
    return run("evaluate", places)


def main() -> None:
    """Train the micro checkpoint from nothing, or go on with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="length of a slice; default: to the end")
    options = parser.parse_args()
    raise SystemExit(rebuild(options.folder, options.seconds))


if __name__ == "__main__":
    main()
