"""The card's figures: rows of the parts that are there, and their place in the card."""

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.checkpoint import open_checkpoint
from training.config import write_configs
from training.corpus import GROUPS
from training.encoders import EncoderTraining, write_encoder
from training.evaluate import BEGIN, END, Row, Subject, named_events, put_into, table
from training.smoke import tones
from training.vocoder import VocoderTraining, write_vocoder

pytestmark = pytest.mark.unit


def test_only_parts_that_are_there_are_measured(configs, tmp_path, monkeypatch):
    torch.manual_seed(0)
    write_configs(tmp_path)
    clips = {group: [tones("hibari", "yes", 6, 0), tones("hibari", "no", 7, 1)] for group in GROUPS}
    subject = Subject(open_checkpoint(tmp_path), configs, clips, listen=1, corpus=tmp_path)
    assert list(subject.rows()) == []
    write_encoder(tmp_path, EncoderTraining(configs.whisper, configs.whisper_features))
    measures = [row.measure for row in subject.rows()]
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
    assert len(list(subject.rows())) == 3
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
