"""The study of the codebook: a few steps on what a stand-in teacher hears, and codes for a clip."""

import numpy as np
import pytest
import torch

from training.codebook import Recipe
from training.hearing import FRAME_SAMPLES, Hearing
from training.loop import Loop, Plan
from training.study import TaughtCodes
from training.teacher import TEACHER_WIDTH

pytestmark = pytest.mark.unit


class Ear:
    """A teacher that hears a frame's first samples."""

    def hear(self, wave):
        frames = np.pad(wave, (0, -len(wave) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
        return torch.from_numpy(np.pad(frames, ((0, 0), (0, TEACHER_WIDTH - FRAME_SAMPLES))).astype(np.float32))


def test_codes_are_trained_on_the_teacher_s_states(configs, tone_clips, tmp_path):
    torch.manual_seed(0)
    training = TaughtCodes(32, 16, 80, Recipe(continuous_steps=3, batch=8))
    hearing = Hearing(tone_clips, Ear(), configs.vq_features, configs, seed=1, taught_every=1)
    plan = Plan(steps=6, learning_rate=1e-2, warmup=1, report_every=1)
    loop = Loop("study", training, lambda step: training.losses(hearing.batch(step, 8), step), plan, tmp_path)
    history = loop.run().history
    assert history[-1]["commit"] > 0 == history[0]["commit"]
    assert history[-1]["letters"] < history[0]["letters"]
    codes = training.codes_of(tone_clips[0], Ear())
    assert codes.shape == (tone_clips[0].tokens,)
    assert int(codes.max()) < 32
