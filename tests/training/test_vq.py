"""The tokenizer's trainer: a few real steps, and a folder that loads strictly."""

import pytest
import torch

from kimia.model.vq import load_vq
from training.codebook import Recipe, Weights, judge
from training.config import write_configs
from training.hearing import Hearing
from training.loop import Loop, Plan
from training.vq import VQTraining, write_vq

pytestmark = pytest.mark.unit

RECIPE = Recipe(continuous_steps=1, batch=4)


@pytest.fixture
def hearing(configs, tone_clips):
    return Hearing(tone_clips, None, configs.vq_features, configs, seed=1)


def training(configs, recipe=RECIPE):
    torch.manual_seed(0)
    return VQTraining(configs.vq, configs.vq_features, configs.flow, recipe)


def test_steps_run_with_and_without_quantising(configs, hearing, tmp_path):
    made = training(configs, Recipe(continuous_steps=2, batch=8, restart_every=3))
    made.kept = [torch.randn(512, 128)]  # k-means wants as many states as codes
    plan = Plan(steps=5, learning_rate=1e-3, warmup=1, report_every=1)
    history = Loop("vq", made, lambda step: made.losses(hearing.batch(step, 8), step), plan, tmp_path).run().history
    assert [row["commit"] > 0 for row in history] == [False, False, True, True, True]
    assert made.book.ready
    assert {"letters", "lesson", "mel", "shape"} <= history[-1].keys()


def test_gradients_pass_through_the_codes(configs, hearing):
    made = training(configs, Recipe(continuous_steps=0, weights=Weights(lesson=0, commit=0, shape=0)))
    made.kept = [torch.randn(512, 128)]
    sum(made.losses(hearing.batch(0, 4), 1).values()).backward()
    assert made.tokenizer.conv1.weight.grad.abs().sum() > 0


def test_what_is_written_loads_strictly_and_gives_the_same_codes(configs, tone_clips, tmp_path):
    made = training(configs)
    made.book.begin(torch.cat(made.tokenizer.hidden([clip.heard() for clip in tone_clips] * 20)))
    checkpoint = write_configs(tmp_path)
    write_vq(tmp_path, made)
    loaded = load_vq(checkpoint.vq_tokenizer, "cpu")
    waves = [clip.heard() for clip in tone_clips]
    rounded = made.finished().half().float()  # as it is stored
    assert torch.equal(torch.cat(rounded.encode(waves)), torch.cat(loaded.encode(waves)))


def test_judging_reads_the_codes_that_serving_gives(configs, hearing, tone_clips):
    made = training(configs)
    made.book.begin(torch.randn(512, 128))
    found = judge(made, tone_clips, hearing, made.codes_of)
    assert found["characters"].items == len(tone_clips)
    assert found["perplexity"] >= 1
    assert found["mel error"] > 0
    callers = [clip for clip in tone_clips if clip.item.voice != "hibari"]
    assert "mel error" not in judge(made, callers, hearing, made.codes_of)
