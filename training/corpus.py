"""The corpus: a list of (voice, text) with the sound of each, made once and resumable.

    python -m training.corpus --out FOLDER --speaker 3000 --callers 4000 --test 200

Only what is missing is made, so an interrupted run goes on. A wrong line, a missing or an unreadable sound stops with
the item's number; finished work stays.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr

from kimia.errors import AudioError, KimiaError, ParameterError
from kimia.model.writing import whole_file
from training.ahead import made
from training.options import add_slice, deadline, unfinished
from training.progress import bar
from training.texts import sample_text, shop_sentences
from training.voices import BY_NAME, CALLERS, HEARING_RATE, SPEAKER, SPEECH_RATE, STRANGERS, Cache, Voice

LIST = "corpus.jsonl"
PACKED, PACKED_INDEX = "corpus.npy", "corpus.index.json"
TOKEN_SAMPLES = 1920  # at SPEECH_RATE: one semantic token, 80 ms
LEAST_SECONDS, MOST_SECONDS = 0.3, 15.0  # of a sentence of the domain; anything else is a failed synthesis


@dataclass(frozen=True)
class Item:
    """One sentence in one voice."""

    split: str  # train | seen (held-out texts, trained voices) | unseen (held-out texts, voices never trained on)
    voice: str
    text: str


@dataclass(frozen=True, eq=False)
class Clip:
    """An item with its sound, padded with silence to whole tokens."""

    item: Item
    speech: np.ndarray  # (S,) int16 at SPEECH_RATE, S a multiple of TOKEN_SAMPLES

    @property
    def tokens(self) -> int:
        """Semantic tokens, at 12.5 Hz."""
        return len(self.speech) // TOKEN_SAMPLES

    def heard(self) -> np.ndarray:
        """The sound at HEARING_RATE, float32."""
        wave = self.speech.astype(np.float32) / 2**15
        return np.asarray(soxr.resample(wave, SPEECH_RATE, HEARING_RATE, quality="HQ"))


def plan(speaker: int, callers: int, test: int, seed: int) -> list[Item]:
    """The corpus: all that the shop says, `speaker` and `callers` training sentences, `test` of either kind of test."""
    rng = random.Random(seed)
    items = [
        *(Item("train", SPEAKER.name, text) for text in sorted(shop_sentences())),
        *_drawn(rng, "train", (SPEAKER,), speaker),
        *_drawn(rng, "train", CALLERS, callers),
        *_drawn(rng, "seen", (SPEAKER,), test),
        *_drawn(rng, "seen", CALLERS, test),
        *_drawn(rng, "unseen", STRANGERS, test),
    ]
    return list(dict.fromkeys(items))


def _drawn(rng: random.Random, split: str, voices: Sequence[Voice], count: int) -> list[Item]:
    """`count` different items."""
    items: dict[Item, None] = {}
    while len(items) < count:
        items[Item(split, rng.choice(voices).name, sample_text(rng, held_out=split != "train"))] = None
    return list(items)


def write_list(folder: Path, items: Sequence[Item]) -> None:
    """Write the list of a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / LIST) as partial:
        partial.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_list(folder: Path) -> list[Item]:
    """Read the list of a corpus. Raises ParameterError that names the wrong line."""
    path = folder / LIST
    if not path.exists():
        raise ParameterError(f"{path}: no such corpus; make it with python -m training.corpus --out {folder}")
    return [_item(path, number, line) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]


def _item(path: Path, number: int, line: str) -> Item:
    try:
        item = Item(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ParameterError(f"{path}:{number}: is no item ({error}); write the list again") from error
    if item.voice not in BY_NAME:
        raise ParameterError(f"{path}:{number}: no voice is called {item.voice!r}")
    return item


def load_clip(folder: Path, item: Item, number: int) -> Clip:
    """The sound of item `number`, made if need be. Raises AudioError that names the item."""
    try:
        wave = Cache(folder).speech(BY_NAME[item.voice], item.text)
    except KimiaError as error:
        raise AudioError(f"item {number} ({item.voice}: {item.text!r}): {error}") from error
    if not LEAST_SECONDS <= len(wave) / SPEECH_RATE <= MOST_SECONDS:
        raise AudioError(
            f"item {number} ({item.voice}: {item.text!r}): {len(wave) / SPEECH_RATE:.2f} s is no length of a sentence"
        )
    padded = np.pad(wave, (0, -len(wave) % TOKEN_SAMPLES))
    return Clip(item, np.clip(np.rint(padded * 2**15), -(2**15), 2**15 - 1).astype(np.int16))


def load_clips(folder: Path, split: str, voice: str | None = None) -> list[Clip]:
    """Clips of one split, of one voice where named, in the list's order."""
    items = enumerate(read_list(folder), 1)
    wanted = [(n, item) for n, item in items if item.split == split and voice in (None, item.voice)]
    packed = _unpacked(folder)
    return [
        Clip(item, packed[item]) if item in packed else load_clip(folder, item, n)
        for n, item in bar(wanted, desc=f"clips ({split})")
    ]


def balanced(clips: Sequence[Clip], speaker: int | None, callers: int | None) -> list[Clip]:
    """The first `speaker` clips of the speaking voice and the first `callers` of callers; None for all."""
    spoken = [clip for clip in clips if clip.item.voice == SPEAKER.name]
    called = [clip for clip in clips if clip.item.voice != SPEAKER.name]
    return [*spoken[:speaker], *called[:callers]]


GROUPS = ("speaker", "callers", "strangers")


def held_out(folder: Path, group: str, limit: int | None = None) -> list[Clip]:
    """Clips with held-out texts: of the speaking voice, of callers that were trained on, or of strangers."""
    clips = load_clips(folder, "unseen" if group == "strangers" else "seen")
    wanted = [clip for clip in clips if (clip.item.voice == SPEAKER.name) == (group == "speaker")]
    return wanted[:limit]


# ---- all sound in one file --------------------------------------------------------------------------------------


def pack(folder: Path, clips: Sequence[Clip]) -> None:
    """Put the sound of clips end to end into one file, from which a trainer starts at once."""
    ends = np.cumsum([len(clip.speech) for clip in clips]).tolist()
    index = [asdict(clip.item) | {"end": end} for clip, end in zip(clips, ends, strict=True)]
    with whole_file(folder / PACKED) as partial, open(partial, "wb") as file:
        np.save(file, np.concatenate([clip.speech for clip in clips]))
    with whole_file(folder / PACKED_INDEX) as partial:
        partial.write_text(json.dumps(index), encoding="utf-8")


def _unpacked(folder: Path) -> dict[Item, np.ndarray]:
    """The packed sound by item, mapped, not read; empty where nothing is packed. Raises AudioError."""
    if not (folder / PACKED_INDEX).exists():
        return {}
    rows = json.loads((folder / PACKED_INDEX).read_text(encoding="utf-8"))
    sound = np.load(folder / PACKED, mmap_mode="r")
    ends = [row.pop("end") for row in rows]
    if not ends or ends[-1] != len(sound):
        raise AudioError(f"{folder / PACKED}: does not match its index; delete both files and make the corpus again")
    return {Item(**row): sound[start:end] for row, start, end in zip(rows, [0, *ends], ends, strict=False)}


def main() -> None:
    """Make a corpus."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--speaker", type=int, default=3000)
    parser.add_argument("--callers", type=int, default=4000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    add_slice(parser)
    options = parser.parse_args()
    until = deadline(options)
    items = plan(options.speaker, options.callers, options.test, options.seed)
    write_list(options.out, items)
    spoken = made(lambda number: load_clip(options.out, items[number], number + 1), range(len(items)), options.workers)
    clips: list[Clip] = []
    for clip in bar(spoken, desc="speaking", total=len(items)):
        clips.append(clip)
        if time.monotonic() >= until and len(clips) < len(items):
            unfinished(f"corpus: {len(clips)} of {len(items)} sentences are spoken")
    pack(options.out, clips)


if __name__ == "__main__":
    main()
