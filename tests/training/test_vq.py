"""The tokenizer's trainer: a few real steps, and a folder that loads strictly."""

import pytest
import torch

from kimia.errors import CheckpointError
from kimia.model.vq import load_vq
from training.codebook import Recipe, Weights, judge
from training.config import ENCODER, write_configs
from training.encoders import EncoderTraining
from training.hearing import Hearing
from training.loop import Loop, Plan
from training.study import TaughtCodes
from training.teacher import TEACHER_WIDTH
from training.vq import VQTraining, read_vq, write_vq

pytestmark = pytest.mark.unit

RECIPE = Recipe(continuous_steps=1)


@pytest.fixture
def hearing(configs, tone_clips):
    return Hearing(tone_clips, None, configs.vq_features, configs, seed=1)


def training(configs, recipe=RECIPE):
    torch.manual_seed(0)
    return VQTraining(configs.vq, configs.vq_features, configs.flow, recipe)


def test_steps_run_with_and_without_quantising(configs, hearing, tmp_path):
    made = training(configs, Recipe(continuous_steps=2, restart_every=3))
    made.kept = [torch.randn(512, 192)]  # k-means wants as many states as codes
    plan = Plan(steps=5, learning_rate=1e-3, warmup=1, report_every=1)
    history = Loop("vq", made, lambda step: made.losses(hearing.batch(step, 8), step), plan, tmp_path).run().history
    assert [row["commit"] > 0 for row in history] == [False, False, True, True, True]
    assert made.book.ready
    assert {"letters", "lesson", "mel", "shape"} <= history[-1].keys()


def test_gradients_pass_through_the_codes(configs, hearing):
    made = training(configs, Recipe(continuous_steps=0, weights=Weights(lesson=0, commit=0, shape=0)))
    made.kept = [torch.randn(512, 192)]
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


def test_a_later_run_begins_with_what_was_written(configs, tone_clips, tmp_path):
    made, later = training(configs), training(configs)
    made.book.begin(torch.randn(600, 192))
    torch.nn.init.normal_(made.pupil.weight)
    write_configs(tmp_path)
    write_vq(tmp_path, made)
    read_vq(tmp_path, later)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], value, atol=1e-2, rtol=1e-2, msg=name)
    assert later.book.ready
    assert later.tokenizer.conv1.weight.requires_grad


def test_judging_reads_the_codes_that_serving_gives(configs, hearing, tone_clips):
    made = training(configs)
    made.book.begin(torch.randn(512, 192))
    found = judge(made, tone_clips, hearing, made.codes_of)
    assert found["characters"].items == len(tone_clips)
    assert found["perplexity"] >= 1
    assert found["mel error"] > 0
    callers = [clip for clip in tone_clips if clip.item.voice != "hibari"]
    assert "mel error" not in judge(made, callers, hearing, made.codes_of)


def study(width=192):
    """A study that has codes."""
    torch.manual_seed(1)
    made = TaughtCodes(512, width, 80, Recipe(0))
    made.book.begin(torch.randn(512, width), rounds=1)
    return made


def test_it_begins_with_the_encoder_s_weights_and_the_study_s_codes(configs):
    made, encoder, guide = training(configs), EncoderTraining(configs.whisper, configs.whisper_features), study()
    made.begin(encoder, guide)
    torch.testing.assert_close(made.tokenizer.layers[3].fc1.weight, encoder.whisper.encoder.layers[3].fc1.weight)
    torch.testing.assert_close(made.finished().codebook.weight, guide.book.rows)
    torch.testing.assert_close(made.head.letters.weight, guide.head.letters.weight)
    with pytest.raises(CheckpointError, match="of other dimensions"):
        made.begin(encoder, study(width=ENCODER["d_model"] // 2))


def test_the_right_choice_is_the_guide_s_code(configs, tone_clips):
    made, guide = training(configs), study()
    made.book.load_state_dict(guide.book.state_dict())
    made.guide = (guide,)
    states = torch.randn(400, TEACHER_WIDTH)
    batch = Hearing(tone_clips, lambda clip: states, configs.vq_features, configs, seed=1).batch(0, 4)
    right = guide.book.rows[guide.book.nearest(guide.hidden(batch.taught).flatten(0, 1))].view(4, -1, 192)
    assert made.choice_loss(right, batch) < 0.1 < made.choice_loss(right.roll(1, -1), batch)
    assert "choice" in made.losses(batch, 0)
    assert not [name for name in made.state_dict() if name.startswith("guide")]
