"""The teacher's states of every training clip, heard once and kept on disk: each run would pay for them again.

    python -m training.states --corpus FOLDER

A shard holds the states of `SHARD_CLIPS` clips end to end, 16 bit: 140 MB an hour of speech. What is kept is
not heard again, so a broken-off run goes on with the next shard, and a corpus may grow.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kimia.errors import CheckpointError
from kimia.model.writing import whole_file
from training.ahead import made
from training.config import trainer_configs
from training.corpus import Clip, Item, balanced, load_clips
from training.options import add_slice, deadline, unfinished
from training.progress import bar
from training.teacher import TEACHER_WIDTH, Teacher, load_teacher

FOLDER = "taught"  # in a corpus
SHARD_CLIPS = 250

States = Callable[[Clip], Tensor]  # of a clean clip: (J, TEACHER_WIDTH)


@dataclass(frozen=True)
class Listening:
    """With how many processes, and until when by `time.monotonic`."""

    workers: int = 0
    until: float = math.inf


def keep_states(
    folder: Path, clips: Sequence[Clip], teacher: Teacher, segment: int, listening: Listening = Listening()
) -> int:
    """Write the states of those clips of which none are kept yet; of each its first `segment` samples are heard.

    How many clips were not heard in time.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    kept = _kept(folder)
    missing = [clip for clip in clips if _key(clip.item) not in kept]
    # Behind the last: one that was broken off leaves a gap, and a number that is there is never written again
    first = 1 + max((int(path.stem) for path in (folder / FOLDER).glob("*.pt")), default=-1)
    shards = [missing[start : start + SHARD_CLIPS] for start in range(0, len(missing), SHARD_CLIPS)]

    def keep(number: int) -> int:
        heard = []
        for clip in shards[number]:
            if time.monotonic() >= listening.until:
                return len(shards[number])
            heard.append((*_key(clip.item), teacher.hear(clip.heard()[:segment]).half().clone()))
        with whole_file(folder / FOLDER / f"{first + number:04}.pt") as partial, open(partial, "wb") as file:
            torch.save(heard, file)
        return 0

    done = made(keep, range(len(shards)), min(listening.workers, len(shards)))
    return sum(bar(done, desc="teacher", total=len(shards)))


def _kept(folder: Path) -> dict[tuple[str, str], Tensor]:
    return {
        (voice, text): states
        for path in sorted((folder / FOLDER).glob("*.pt"))
        for voice, text, states in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    }


def taught_clips(folder: Path) -> tuple[list[Clip], States]:
    """The training clips whose states are kept, and their states. Raises CheckpointError when there are none."""
    kept = _kept(folder)
    clips = [clip for clip in load_clips(folder, "train") if _key(clip.item) in kept]
    if not clips:
        raise CheckpointError(
            f"{folder / FOLDER}: no training clip was heard; run python -m training.states --corpus {folder}"
        )
    return clips, lambda clip: kept[_key(clip.item)]


def placeless(clips: Sequence[Clip], states: States) -> States:
    """States less what is usual that long after the beginning of a clip.

    A third of their variance is the place in the clip, which a pupil that hears several clips in a row cannot know.
    """
    longest = max(len(states(clip)) for clip in clips)
    total, count = torch.zeros(longest, TEACHER_WIDTH), torch.zeros(longest, 1)
    for clip in clips:
        heard = states(clip)
        total[: len(heard)] += heard
        count[: len(heard)] += 1
    usual = total / count
    return lambda clip: states(clip) - usual[: len(states(clip))]


def _key(item: Item) -> tuple[str, str]:
    return item.voice, item.text


def main() -> None:
    """Let the teacher hear the training clips of a corpus."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--speaker", type=int, help="clips of the speaking voice; all without")
    parser.add_argument("--callers", type=int, help="clips of callers; all without")
    add_slice(parser)
    options = parser.parse_args()
    listening = Listening(options.workers, deadline(options))
    configs = trainer_configs()
    clips = balanced(load_clips(options.corpus, "train"), options.speaker, options.callers)
    segment = configs.whisper_features.segment_samples
    if missing := keep_states(options.corpus, clips, load_teacher(), segment, listening):
        unfinished(f"teacher: {missing} of {len(clips)} clips are not heard yet")


if __name__ == "__main__":
    main()
