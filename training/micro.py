"""Every stage of the micro checkpoint, two beside each other: `python -m training.micro --folder FOLDER`.

A stage begins when those that it learns from have ended, on a lane of its own. One that has ended well leaves a file
`finished` in its folder and is not run again; delete the folder to train it anew. One that fails holds up only those
that learn from it. With `--seconds` the stages end in time, as for a machine that is lent for minutes, and the same
command goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from training import corpus, states
from training.ahead import cores
from training.options import UNFINISHED
from training.progress import LINE

FINISHED = "finished"
RESERVE = 30.0  # seconds of a slice for starting, and for keeping what was done
CORPUS = ("--speaker", "6000", "--callers", "5000", "--test", "200")
TAUGHT = ("--speaker", "2500")  # heard by the encoders: all clips of the speaking voice would outweigh the callers'
LANES = 2  # a third would save the two minutes of the study

Run = Callable[[str, Sequence[object], int], int]  # a module of training, its words, its lane: the exit code


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str  # of the module
    arguments: Sequence[object]
    finished: Path | None  # is there when nothing is left to do; None: the command itself knows what is left
    after: Sequence[str] = ()  # names of the stages that it learns from


def stages(folder: Path) -> list[Stage]:
    """What is trained below a folder; in the order in which those begin that could: the longest way first."""
    sound, checkpoint, study = folder / "corpus", folder / "checkpoint", folder / "study"
    lane = ("--workers", max(0, cores() // LANES - 1))  # processes beside the trainer itself

    def trainer(name: str, run: str, after: Sequence[str], *more: object) -> Stage:
        places = ("--corpus", sound, "--run", folder / run, "--checkpoint", checkpoint)
        return Stage(name, (*places, *more, *lane), folder / run / FINISHED, after)

    return [
        Stage("corpus", ("--out", sound, *CORPUS, "--workers", cores()), sound / corpus.PACKED_INDEX),
        Stage("states", ("--corpus", sound, *TAUGHT, *lane), sound / states.FOLDER / FINISHED, ("corpus",)),
        Stage("study", ("--corpus", sound, "--run", study, *lane), study / FINISHED, ("states",)),
        trainer("encoders", "encoder", ("states",)),
        trainer("vq", "vq", ("study", "encoders"), "--study", study),
        trainer("vocoder", "vocoder", ("corpus",)),
        trainer("language_model", "language_model", ("vq",)),
        trainer("flow", "flow", ("vq",)),
        Stage("evaluate", ("--corpus", sound, "--checkpoint", checkpoint), None, ("vocoder", "language_model", "flow")),
    ]


def _run(name: str, arguments: Sequence[object], lane: int) -> int:
    command = [sys.executable, "-m", f"training.{name}", *map(str, arguments)]
    return subprocess.run(command, check=False, env={**os.environ, LINE: str(lane)}).returncode


def rebuild(folder: Path, seconds: float, run: Run = _run) -> int:
    """Run every stage that is not finished, for so many seconds. The exit code; 0 when a slice is over."""
    until = time.monotonic() + seconds - (RESERVE if math.isfinite(seconds) else 0.0)
    codes = _run_all(stages(folder), until, run)
    if not any(codes.values()):
        print(f"All is trained and measured: {folder / 'checkpoint'}")
    return next((code for code in codes.values() if code not in (0, UNFINISHED)), 0)


def _run_all(wanted: Sequence[Stage], until: float, run: Run) -> dict[str, int]:
    """Exit codes of the stages that could begin, by name; 0 also for those that had ended before."""
    codes = {stage.name: 0 for stage in wanted if stage.finished and stage.finished.exists()}
    running: dict[Future[int], tuple[Stage, int]] = {}
    with ThreadPoolExecutor(LANES) as pool:
        while True:
            begun = {*codes, *(stage.name for stage, _ in running.values())}
            could = [one for one in wanted if one.name not in begun and all(codes.get(name) == 0 for name in one.after)]
            free = set(range(LANES)) - {lane for _, lane in running.values()}
            for stage, lane in zip(could, free, strict=False):
                running[pool.submit(_run_one, stage, until, lane, run)] = stage, lane
            if not running:
                return codes
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                stage, _ = running.pop(done)
                codes[stage.name] = done.result()


def _run_one(stage: Stage, until: float, lane: int, run: Run) -> int:
    left = until - time.monotonic()
    code = run(stage.name, (*stage.arguments, "--seconds", left), lane) if left > 0 else UNFINISHED
    if code == UNFINISHED:
        print(f"The slice is over in stage {stage.name}; what was done is kept. The same command goes on.")
    elif code:
        print(f"Stage {stage.name} failed: see above. The same command goes on from the last state that was kept.")
    elif stage.finished:
        stage.finished.touch()
    return code


def main() -> None:
    """Train the micro checkpoint from nothing, or go on with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="length of a slice; default: to the end")
    options = parser.parse_args()
    raise SystemExit(rebuild(options.folder, options.seconds))


if __name__ == "__main__":
    main()
