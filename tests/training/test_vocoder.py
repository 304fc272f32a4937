"""The vocoder's trainer: losses that know a good wave, a few real steps, a folder that loads strictly."""

import random

import pytest
import torch

from kimia.model.bigvgan import load_vocoder
from training.config import write_configs
from training.loop import Loop, Plan
from training.speaking import Speaking
from training.vocoder import PIECE_FRAMES, VocoderTraining, spectra_error, write_vocoder

pytestmark = pytest.mark.unit


@pytest.fixture
def training(configs):
    torch.manual_seed(0)
    return VocoderTraining(configs.vocoder, configs.flow)


@pytest.fixture
def spoken(configs, tone_clips):
    clips = [clip for clip in tone_clips if clip.item.voice == "hibari"]
    return Speaking(clips, None, configs.flow, configs.vocoder, seed=1).batch(0, 2)


def test_losses_are_zero_for_the_wave_itself_and_grow_with_noise(training):
    wave = 0.1 * torch.randn(2, 9600, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 9600, generator=torch.Generator().manual_seed(1))
    for error in (spectra_error, training.mel_error):
        assert error(wave, wave) == pytest.approx(0.0, abs=1e-5)
        assert 0 < error(wave + 0.01 * noise, wave) < error(wave + 0.1 * noise, wave)


def test_it_begins_finite_and_quiet(training):
    wave = training.vocoder(torch.randn(1, 80, 20))
    assert wave.shape == (1, 20 * 480)
    assert torch.isfinite(wave).all()
    assert wave.abs().max() < 1.0


def test_the_first_steps_do_without_filters_and_serving_never_does(configs, spoken):
    torch.manual_seed(0)
    training = VocoderTraining(configs.vocoder, configs.flow, plain_steps=1)
    mel = torch.randn(1, 80, 20, generator=torch.Generator().manual_seed(0))
    served = training.vocoder(mel)
    training.losses(spoken, 0)
    assert not torch.allclose(training.vocoder(mel), served, atol=1e-4)
    training.losses(spoken, 1)
    torch.testing.assert_close(training.vocoder(mel), served, rtol=0, atol=0)


def test_a_piece_has_mel_and_wave_of_one_place(training, spoken):
    for seed in range(5):
        mel, wave = training._piece(spoken[0], random.Random(seed))
        assert mel.shape == (PIECE_FRAMES, 80)
        assert wave.shape == (PIECE_FRAMES * 480,)
        place = next(n for n in range(0, len(spoken[0].mel)) if torch.equal(spoken[0].mel[n], mel[0]))
        length = min(len(wave), len(spoken[0].wave) - place * 480)
        torch.testing.assert_close(wave[:length], spoken[0].wave[place * 480 : place * 480 + length])


def test_steps_run_and_the_loss_falls(training, spoken, tmp_path):
    plan = Plan(steps=4, learning_rate=4e-4, warmup=1, clip=3.0, report_every=1)
    history = Loop("vocoder", training, lambda step: training.losses(spoken[:1], 0), plan, tmp_path).run().history
    assert history[-1]["mel"] + history[-1]["spectra"] < history[0]["mel"] + history[0]["spectra"]


def test_what_is_written_loads_strictly_and_sounds_the_same(training, tmp_path):
    checkpoint = write_configs(tmp_path)
    write_vocoder(tmp_path, training)
    loaded = load_vocoder(checkpoint.vocoder, "cpu", torch.float32)
    mel = torch.randn(1, 80, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(mel), training.vocoder(mel), atol=1e-5, rtol=1e-4)
