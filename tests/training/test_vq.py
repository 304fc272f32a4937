"""The tokenizer's trainer: codebook arithmetic, a few real steps, and a folder that loads strictly."""

import pytest
import torch

from kimia.model.vq import load_vq
from training.config import write_configs
from training.hearing import Hearing
from training.loop import Loop, Plan
from training.vq import Codebook, Head, Recipe, VQTraining, Weights, judge, mel_loss, write_vq

pytestmark = pytest.mark.unit

RECIPE = Recipe(continuous_steps=1, batch=4)


@pytest.fixture
def hearing(configs, tone_clips):
    return Hearing(tone_clips, None, configs.vq_features, configs.vocoder, configs.flow, seed=1)


def training(configs, recipe=RECIPE):
    torch.manual_seed(0)
    return VQTraining(configs.vq, configs.vq_features, configs.flow, recipe)


def blobs(count, each, width=4):
    """Points around `count` centres, and the centres."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(count, width, generator=generator)
    return (centres[:, None] + 0.01 * torch.randn(count, each, width, generator=generator)).flatten(0, 1), centres


def test_a_codebook_begins_where_the_states_are():
    torch.manual_seed(0)
    states, centres = blobs(3, 50)
    book = Codebook(8, 4, 0.9)
    book.begin(states)
    assert book.ready
    assert torch.cdist(centres, book.rows).min(1).values.max() < 0.1


def test_codes_follow_the_states_that_chose_them():
    torch.manual_seed(0)
    states, _ = blobs(2, 50)
    book = Codebook(2, 4, 0.5)
    book.begin(states)
    moved = states + 1.0
    for _ in range(30):
        book.follow(moved, book.nearest(moved))
    assert torch.cdist(moved, book.rows).min(1).values.max() < 0.1


def test_dead_codes_begin_anew_at_states():
    torch.manual_seed(0)
    states, _ = blobs(2, 50)
    book = Codebook(4, 4, 0.5)
    book.begin(states)
    with torch.no_grad():
        book.total[3] = 1000.0 * book.count[3]
        book.count[3] *= 1e-6
        book.total[3] *= 1e-6
    assert book.restart(states) == 1
    assert torch.cdist(book.rows[3:], states).min() < 1e-4
    assert book.restart(states) == 0


def test_the_head_gives_four_frames_a_code():
    letters, mel = Head(16, 80)(torch.zeros(2, 5, 16))
    assert letters.shape == (2, 20, 29)
    assert mel.shape == (2, 20, 80)


def test_the_mel_counts_only_where_there_is_a_target(configs, hearing):
    batch = hearing.batch(0, 8)
    exact = mel_loss(batch.spoken, batch)
    assert exact == 0
    assert mel_loss(batch.spoken + 1.0, batch) == pytest.approx(1.0, abs=1e-5)


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
    ours, theirs = torch.cat(made.finished().encode(waves)), torch.cat(loaded.encode(waves))
    assert (ours == theirs).float().mean() > 0.9  # stored in float16


def test_judging_reads_the_codes_that_serving_gives(configs, hearing, tone_clips):
    made = training(configs)
    made.book.begin(torch.randn(512, 128))
    found = judge(made, tone_clips, hearing)
    assert found["characters"].items == len(tone_clips)
    assert found["perplexity"] >= 1
    assert found["mel error"] > 0
    assert "mel error" not in judge(made, [clip for clip in tone_clips if clip.item.voice != "hibari"], hearing)
