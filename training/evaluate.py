"""What the parts of a checkpoint can do, measured on held-out texts: the table of its model card.

    python -m training.evaluate --checkpoint FOLDER --corpus FOLDER [--limit 200] [--listen 100]

A part that is not there yet has no rows. The table is printed, and put into the card between its marks. Nothing here
has seen a held-out text; strangers are voices that nothing was trained on.

What was found is kept beside the corpus, for this checkpoint, these test texts and numbers of items: the same command
goes on where it was broken off, or where its `--seconds` were over. A measure is taken whole. Where the code that
measures has changed, delete CORPUS/figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kimia.errors import ParameterError
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import ARCHIVE, SHARD_INDEX, SINGLE_FILE, Checkpoint, open_checkpoint
from kimia.model.detokenize import Detokenizer
from kimia.model.presets import PRESETS, Preset
from kimia.model.writing import whole_file
from training import encoders
from training.ahead import cores, made
from training.answers import LINES, Exam, Section, Shop
from training.augment import CALLER, augmented
from training.codebook import Recipe
from training.codebook import judge as judge_codes
from training.config import MicroConfigs, trainer_configs
from training.corpus import GROUPS, LIST, Clip, held_out
from training.encoders import EncoderTraining, name_event, read_encoder
from training.hearing import Hearing
from training.listening import griffin_lim, transcript
from training.options import add_slice, deadline, unfinished
from training.scores import Row, error_rate
from training.sounds import SOUNDS, sound
from training.texts import comparable
from training.vq import VQTraining, read_vq

CARD = "README.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"
NO_CARD = f"# kimia micro, trained anew\n\n{BEGIN}{END}\n"
FOLDER = "figures"  # in a corpus: what was found before
EVENTS_SEED = 77  # of the sound events: none of a training step's


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what."""

    checkpoint: Checkpoint
    configs: MicroConfigs
    clips: dict[str, list[Clip]]  # by group
    listen: int  # clips of the speaking voice that the judge listens to
    corpus: Path
    workers: int = 0  # processes that measure beside each other, where items do not need one another

    def sections(self) -> dict[str, Section]:
        """All measures of the parts that are there, by what is measured together."""
        found: dict[str, Section] = {}
        if (self.checkpoint.whisper / SINGLE_FILE).exists():
            found["features"] = self._features
        if (self.checkpoint.vq_tokenizer / SINGLE_FILE).exists():
            found["codes"] = self._codes
        if (self.checkpoint.vocoder / ARCHIVE).exists():
            found["vocoder"] = self._vocoder
        if (self.checkpoint.vocoder / ARCHIVE).exists() and (self.checkpoint.flow / ARCHIVE).exists():
            found["speech"] = self._speech
            if (self.checkpoint.root / SHARD_INDEX).exists():
                shop, items = Shop.load(self.checkpoint.root, self.corpus), len(self.clips[GROUPS[0]])
                found |= Exam(shop, items, self.listen, self.workers).sections()
        return found

    # ---- hearing ----

    def _features(self) -> Iterator[Row]:
        training = EncoderTraining(self.configs.whisper, self.configs.whisper_features)
        read_encoder(self.checkpoint.root, training)
        for name, line in LINES.items():
            found = [
                encoders.judge(training, [one.item.text for one in clips], [line(one.heard()) for one in clips])
                for clips in self.clips.values()
            ]
            yield Row(f"letters from the features{name}: characters wrong", tuple(str(one) for one, _ in found))
            yield Row(f"letters from the features{name}: words wrong", tuple(str(one) for _, one in found))
        names, heard = named_events(training, len(self.clips[GROUPS[0]]))
        wrong = error_rate(names, heard, words=True)
        yield Row("sound events named wrongly", (f"{wrong}", "", ""))

    def _codes(self) -> Iterator[Row]:
        training = self._tokenizer()
        hearing = Hearing([], None, self.configs.vq_features, self.configs, seed=0)
        tokenizer = training.finished()
        for name, line in LINES.items():
            found = [
                judge_codes(training, clips, hearing, lambda clip, line=line: tokenizer.encode([line(clip.heard())])[0])  # type: ignore[misc]
                for clips in self.clips.values()
            ]
            for key, what in (("characters", "characters wrong"), ("words", "words wrong")):
                yield Row(f"letters from the codes{name}: {what}", tuple(str(one[key]) for one in found))
            yield Row(f"codes in use{name}: perplexity", tuple(str(one["perplexity"]) for one in found))

    def _tokenizer(self) -> VQTraining:
        training = VQTraining(self.configs.vq, self.configs.vq_features, self.configs.flow, Recipe(0))
        read_vq(self.checkpoint.root, training)
        return training

    # ---- speaking ----

    def _spoken(self) -> list[Clip]:
        return self.clips[GROUPS[0]][: self.listen]

    def _row(self, measure: str, wave_of: Callable[[Clip], np.ndarray]) -> Row:
        clips = self._spoken()
        heard = made(lambda number: transcript(wave_of(clips[number])), range(len(clips)), self.workers)
        errors = error_rate([comparable(clip.item.text) for clip in clips], [*heard], words=True)
        return Row(f"{measure}: words that Whisper tiny.en hears wrongly", (str(errors), "", ""))

    def _vocoder(self) -> Iterator[Row]:
        hearing = Hearing([], None, self.configs.vq_features, self.configs, seed=0)
        flow, vocoder = self.configs.flow, load_vocoder(self.checkpoint.vocoder, "cpu", torch.float32)

        def mel(clip: Clip) -> torch.Tensor:
            target = hearing.speech_target(clip)
            if target is None:
                raise ParameterError(f"only the speaking voice can be copied, got {clip.item.voice}")
            return target * flow.mel_std + flow.mel_mean

        @torch.no_grad()
        def copied(clip: Clip) -> np.ndarray:
            return np.asarray(vocoder(mel(clip).T[None])[0])

        yield self._row("the teacher voice itself", lambda clip: clip.speech.astype(np.float32) / 2**15)
        yield self._row(
            "its mel through Griffin-Lim", lambda clip: griffin_lim(mel(clip), self.configs.vocoder).numpy()
        )
        yield self._row("its mel through the vocoder (copy synthesis)", copied)

    def _speech(self) -> Iterator[Row]:
        tokenizer = self._tokenizer().finished()
        detokenizer = Detokenizer.load(self.checkpoint, "cpu", torch.float32)
        for name, preset in PRESETS.items():

            def spoken(clip: Clip, preset: Preset = preset) -> np.ndarray:
                return detokenizer.synthesize(tokenizer.encode([clip.heard()])[0].tolist(), preset, seed=1).numpy()

            yield self._row(f"its codes through flow model and vocoder, {name}", spoken)


def named_events(training: EncoderTraining, count: int) -> tuple[list[str], list[str]]:
    """Names of `count` new sound events, and what the encoder says."""
    rng, noise = random.Random(EVENTS_SEED), np.random.default_rng(EVENTS_SEED)
    names = [rng.choice(list(SOUNDS)) for _ in range(count)]
    return names, [name_event(training, augmented(noise, sound(name, noise), CALLER).wave) for name in names]


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    head = ["| measure | " + " | ".join(GROUPS) + " |", "|---" * (len(GROUPS) + 1) + "|"]
    return "\n".join([*head, *(f"| {row.measure} | " + " | ".join(row.cells) + " |" for row in rows)]) + "\n"


def put_into(card: str, figures: str) -> str:
    """A card with other figures. Raises ParameterError when the card has no place for them."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ParameterError(f"the model card has no place for figures: put {BEGIN.strip()} and {END} into it")
    return before + begin + figures + end + after


def measure(sections: Mapping[str, Section], record: Path, until: float = math.inf) -> list[Row]:
    """Rows of all sections. Those in the record are not measured again; each is kept there as soon as it is known.

    Ends the program with UNFINISHED where `time.monotonic` comes to be `until` before the last begins.
    """
    known = json.loads(record.read_text("utf-8")) if record.exists() else {}
    for name, section in sections.items():
        if name in known:
            continue
        if time.monotonic() >= until:
            unfinished(f"evaluate: {len(known)} of {len(sections)} measures are taken")
        known[name] = []
        for row in section():
            print(row.measure, *row.cells, sep=" | ", flush=True)
            known[name].append(row)
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(record) as partial:
            partial.write_text(json.dumps(known), encoding="utf-8")
    return [Row(row[0], tuple(row[1])) for name in sections for row in known[name]]


def record_of(checkpoint: Path, corpus: Path, *numbers: int) -> Path:
    """Where the figures of a checkpoint are kept: another file for other weights, test texts or numbers of items."""
    digest = hashlib.sha256(repr(numbers).encode())
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != CARD)
    for path in (corpus / LIST, *sorted(files)):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return corpus / FOLDER / f"{digest.hexdigest()[:16]}.json"


def main() -> None:
    """Measure a checkpoint, and put the figures into its card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="clips of each group")
    parser.add_argument("--listen", type=int, default=200, help="clips that the judge listens to")
    add_slice(parser, workers=cores())
    options = parser.parse_args()
    until = deadline(options)
    clips = {group: held_out(options.corpus, group, options.limit) for group in GROUPS}
    opened = open_checkpoint(options.checkpoint)
    subject = Subject(opened, trainer_configs(), clips, options.listen, options.corpus, options.workers)
    record = record_of(options.checkpoint, options.corpus, options.limit, options.listen)
    figures = table(measure(subject.sections(), record, until))
    print(figures)
    card = options.checkpoint / CARD
    before = card.read_text("utf-8") if card.exists() else NO_CARD
    with whole_file(card) as partial:
        partial.write_text(put_into(before, figures), encoding="utf-8")


if __name__ == "__main__":
    main()
