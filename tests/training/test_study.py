"""The study of the codebook: a few steps on what a stand-in teacher hears, and codes for a clip."""

import numpy as np
import pytest
import torch

from kimia.errors import ParameterError
from training.codebook import Recipe
from training.hearing import FRAME_SAMPLES, Hearing
from training.loop import Loop, Plan
from training.scores import error_rate
from training.study import TaughtCodes, listen
from training.teacher import TEACHER_WIDTH

pytestmark = pytest.mark.unit


class Ear:
    """A teacher that hears a frame's first samples."""

    def hear(self, wave):
        frames = np.pad(wave, (0, -len(wave) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
        return torch.from_numpy(np.pad(frames, ((0, 0), (0, TEACHER_WIDTH - FRAME_SAMPLES))).astype(np.float32))


def hear(clip):
    return Ear().hear(clip.heard())


def test_a_clip_is_heard_as_it_is_as_its_mel_and_as_its_codes(configs, tone_clips, monkeypatch):
    lengths = {}

    def judge(texts, waves):
        lengths[len(lengths)] = [len(wave) for wave in waves]
        return error_rate(texts, texts, words=True)

    monkeypatch.setattr("training.study.word_errors", judge)
    training = TaughtCodes(32, 16, 80, Recipe(continuous_steps=0))
    training.book.begin(torch.randn(64, 16))
    hearing = Hearing(tone_clips, hear, configs.vq_features, configs, seed=1)
    speaker = [clip for clip in tone_clips if clip.item.voice == "hibari"][:2]
    assert list(listen(training, speaker, hearing, Ear())) == ["original", "mel", "codes"]
    assert lengths[0] == lengths[1] == lengths[2] == [len(clip.speech) for clip in speaker]
    with pytest.raises(ParameterError, match="flite-slt"):
        listen(training, tone_clips, hearing, Ear())


def test_codes_are_trained_on_the_teacher_s_states(configs, tone_clips, tmp_path):
    torch.manual_seed(0)
    training = TaughtCodes(32, 16, 80, Recipe(continuous_steps=3))
    hearing = Hearing(tone_clips, hear, configs.vq_features, configs, seed=1)
    plan = Plan(steps=6, learning_rate=1e-2, warmup=1, report_every=1)
    loop = Loop("study", training, lambda step: training.losses(hearing.batch(step, 8), step), plan, tmp_path)
    history = loop.run().history
    assert history[-1]["commit"] > 0 == history[0]["commit"]
    assert history[-1]["letters"] < history[0]["letters"]
    codes = training.codes_of(tone_clips[0], Ear())
    assert codes.shape == (tone_clips[0].tokens,)
    assert int(codes.max()) < 32
