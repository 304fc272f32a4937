"""The card's figures: rows of the parts that are there, and their place in the card."""

import time
from functools import partial

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.checkpoint import open_checkpoint
from training.config import write_configs
from training.corpus import GROUPS, LIST
from training.encoders import EncoderTraining, write_encoder
from training.evaluate import BEGIN, CARD, END, NO_CARD, Subject, measure, named_events, put_into, record_of, table
from training.options import UNFINISHED
from training.scores import Row
from training.smoke import tones
from training.vocoder import VocoderTraining, write_vocoder

pytestmark = pytest.mark.unit


def test_only_parts_that_are_there_are_measured(configs, tmp_path, monkeypatch):
    torch.manual_seed(0)
    write_configs(tmp_path)
    clips = {group: [tones("hibari", "yes", 6, 0), tones("hibari", "no", 7, 1)] for group in GROUPS}
    subject = Subject(open_checkpoint(tmp_path), configs, clips, listen=1, corpus=tmp_path)
    assert subject.sections() == {}
    write_encoder(tmp_path, EncoderTraining(configs.whisper, configs.whisper_features))
    assert list(subject.sections()) == ["features"]
    measures = [row.measure for row in subject.sections()["features"]()]
    assert len(measures) == 5
    assert measures[0] == "letters from the features: characters wrong"
    assert measures[2] == "letters from the features, 8 kHz mu-law: characters wrong"
    assert measures[4] == "sound events named wrongly"
    (tmp_path / "whisper-large-v3" / "model.safetensors").unlink()

    heard = []

    def judge(wave):
        heard.append(len(wave))
        return "yes"

    monkeypatch.setattr("training.evaluate.transcript", judge)
    write_vocoder(tmp_path, VocoderTraining(configs.vocoder, configs.flow))
    assert list(subject.sections()) == ["vocoder"]
    assert len(list(subject.sections()["vocoder"]())) == 3
    assert heard == [len(clips["speaker"][0].speech)] * 3  # the voice, its mel, the vocoder


def test_sound_events_are_the_same_for_every_checkpoint(configs):
    training = EncoderTraining(configs.whisper, configs.whisper_features)
    first, again = (named_events(training, 4) for _ in range(2))
    assert first == again
    assert len(set(first[0])) > 1


def test_figures_are_put_between_the_card_s_marks():
    figures = table([Row("words wrong", ("1", "2", "3"))])
    card = put_into(f"before\n{BEGIN}old\n{END}\nafter\n", figures)
    assert card == f"before\n{BEGIN}{figures}{END}\nafter\n"
    assert "| words wrong | 1 | 2 | 3 |" in card
    with pytest.raises(ParameterError, match="no place for figures"):
        put_into("a card without marks", figures)


def test_a_folder_without_a_card_gets_one():
    assert "| words wrong | 1 |" in put_into(NO_CARD, table([Row("words wrong", ("1",))]))


class Measured:
    """Two sections; counts how often each is measured."""

    def __init__(self):
        self.count = []

    def sections(self, broken=()):
        def section(name):
            self.count.append(name)
            yield Row(name, ("1", ""))
            if name in broken:
                raise KeyboardInterrupt
            yield Row(f"{name}, again", ("2",))

        return {name: partial(section, name) for name in ("hearing", "speaking")}


def test_what_was_measured_is_kept_and_goes_on(tmp_path):
    measured, record = Measured(), tmp_path / "figures" / "known.json"
    with pytest.raises(KeyboardInterrupt):
        measure(measured.sections(broken=("speaking",)), record)
    rows = measure(measured.sections(), record)
    assert measured.count == ["hearing", "speaking", "speaking"]
    assert rows == [
        Row("hearing", ("1", "")), Row("hearing, again", ("2",)),
        Row("speaking", ("1", "")), Row("speaking, again", ("2",)),
    ]  # fmt: skip
    assert measure(measured.sections(), record) == rows
    assert len(measured.count) == 3


def test_figures_are_kept_for_one_checkpoint_one_list_and_one_number_of_items(tmp_path):
    root, corpus = tmp_path / "checkpoint", tmp_path / "corpus"
    for folder in (root / "training", corpus):
        folder.mkdir(parents=True)
    files = [root / "config.json", root / "training" / "heads.safetensors", corpus / LIST]
    for path in files:
        path.write_text("one")
    first = record_of(root, corpus, 200, 100)
    (root / CARD).write_text("a card that was written")
    assert record_of(root, corpus, 200, 100) == first
    others = {first, record_of(root, corpus, 200, 50)}
    for path in files:
        path.write_text("two")
        others.add(record_of(root, corpus, 200, 100))
    assert len(others) == 5


def test_a_slice_ends_between_two_measures(tmp_path, capsys):
    measured, record = Measured(), tmp_path / "known.json"
    with pytest.raises(SystemExit) as ended:
        measure(measured.sections(), record, until=time.monotonic() - 1)
    assert ended.value.code == UNFINISHED
    assert measured.count == []
    assert "0 of 2 measures" in capsys.readouterr().out
