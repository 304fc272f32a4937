"""The teacher's states of every training clip, heard once and kept on disk: each run would pay for them again.

    python -m training.states --corpus FOLDER

A shard holds the states of `SHARD_CLIPS` clips end to end, 16 bit: 140 MB an hour of speech. What is kept is
not heard again, so a broken-off run goes on with the next shard, and a corpus may grow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kimia.errors import CheckpointError
from kimia.model.writing import whole_file
from training.config import trainer_configs
from training.corpus import Clip, Item, balanced, load_clips
from training.teacher import TEACHER_WIDTH, Teacher, load_teacher

FOLDER = "taught"  # in a corpus
SHARD_CLIPS = 250

States = Callable[[Clip], Tensor]  # of a clean clip: (J, TEACHER_WIDTH)


def keep_states(folder: Path, clips: Sequence[Clip], teacher: Teacher, segment: int) -> None:
    """Write the states of those clips of which none are kept yet; of each its first `segment` samples are heard."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    kept = _kept(folder)
    missing = [clip for clip in clips if _key(clip.item) not in kept]
    first = len(list((folder / FOLDER).glob("*.pt")))
    starts = range(0, len(missing), SHARD_CLIPS)
    for number, start in enumerate(tqdm(starts, desc="teacher", disable=None), first):
        heard = [
            (*_key(clip.item), teacher.hear(clip.heard()[:segment]).half().clone())
            for clip in missing[start : start + SHARD_CLIPS]
        ]
        with whole_file(folder / FOLDER / f"{number:04}.pt") as partial, open(partial, "wb") as file:
            torch.save(heard, file)


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
    options = parser.parse_args()
    configs = trainer_configs()
    clips = balanced(load_clips(options.corpus, "train"), options.speaker, options.callers)
    keep_states(options.corpus, clips, load_teacher(), configs.whisper_features.segment_samples)


if __name__ == "__main__":
    main()
