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
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from training import corpus, evaluate, states
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
    finished: Path  # is there when nothing is left to do
    after: Sequence[str] = ()  # names of the stages that it learns from


def stages(folder: Path) -> list[Stage]:
    """What is trained below a folder; of stages that could begin, the first goes first."""
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
        trainer("flow", "flow", ("vq",)),
        trainer("language_model", "language_model", ("vq",)),
        Stage(
            "evaluate",
            ("--corpus", sound, "--checkpoint", checkpoint),
            sound / evaluate.FOLDER / FINISHED,
            ("vocoder", "flow", "language_model"),
        ),
    ]


def _run(name: str, arguments: Sequence[object], lane: int) -> int:
    command = [sys.executable, "-m", f"training.{name}", *map(str, arguments)]
    return subprocess.run(command, check=False, env={**os.environ, LINE: str(lane)}).returncode


def rebuild(folder: Path, seconds: float, run: Run = _run) -> int:
    """Run every stage that is not finished, for so many seconds. The exit code; 0 when a slice is over."""
    until = time.monotonic() + seconds - (RESERVE if math.isfinite(seconds) else 0.0)
    codes = _Lanes(run, until).run(stages(folder))
    for name, code in codes.items():
        if code == UNFINISHED:
            print(f"The slice is over in stage {name}; what was done is kept. The same command goes on.")
        elif code:
            print(f"Stage {name} failed: see above. The same command goes on from the last state that was kept.")
    if not any(codes.values()):
        print(f"All is trained and measured: {folder / 'checkpoint'}")
    return next((code for code in codes.values() if code not in (0, UNFINISHED)), 0)


class _Lanes:
    """Stages that run beside each other until a time."""

    def __init__(self, run: Run, until: float) -> None:
        self._run, self._until = run, until
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for lane in range(LANES):
            self._free.put(lane)

    def run(self, wanted: Sequence[Stage]) -> dict[str, int]:
        """Exit codes of the stages that could begin, by name; 0 also for those that had ended before."""
        codes = {stage.name: 0 for stage in wanted if stage.finished.exists()}
        running: dict[Future[int], Stage] = {}
        with ThreadPoolExecutor(LANES) as lanes:
            while True:
                begun = {*codes, *(stage.name for stage in running.values())}
                ready = [
                    stage
                    for stage in wanted
                    if stage.name not in begun and all(codes.get(before) == 0 for before in stage.after)
                ]
                for stage in ready[: LANES - len(running)]:
                    running[lanes.submit(self._stage, stage)] = stage
                if not running:
                    return codes
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(done)
                    codes[stage.name] = done.result()

    def _stage(self, stage: Stage) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            return UNFINISHED
        lane = self._free.get()
        code = self._run(stage.name, (*stage.arguments, "--seconds", left), lane)
        self._free.put(lane)
        if code == 0:
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
