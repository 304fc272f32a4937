"""The continuous encoder's trainer: a few real steps, and a folder that loads strictly."""

import pytest
import torch
from torch import nn

from kimia.model.whisper import load_whisper
from training.config import write_configs
from training.encoders import EncoderTraining, judge, name_event, write_encoder
from training.hearing import EVENTS, Hearing
from training.loop import Loop, Plan
from training.scores import letter_ids

pytestmark = pytest.mark.unit


@pytest.fixture
def training(configs):
    torch.manual_seed(0)
    return EncoderTraining(configs.whisper, configs.whisper_features)


def test_states_are_those_of_the_served_encoder(training):
    mel = torch.randn(2, 80, 800, generator=torch.Generator().manual_seed(0))
    served = training.whisper.encoder(mel).last_hidden_state
    torch.testing.assert_close(training.states(mel), served, atol=0.1, rtol=0.1)  # bfloat16 where that is fast
    assert training.states(mel[:, :, :60]).shape == (2, 30, 192)


def test_steps_run_and_every_trained_weight_moves(configs, training, tone_clips, tmp_path):
    hearing = Hearing(tone_clips, None, configs.whisper_features, configs, seed=1)
    before = {name: value.detach().clone() for name, value in training.named_parameters() if value.requires_grad}
    plan = Plan(steps=2, learning_rate=1e-3, warmup=1, report_every=1)
    progress = Loop("encoder", training, lambda step: training.losses(hearing.windows(step, 2)), plan, tmp_path).run()
    assert {"letters", "lesson", "events"} <= progress.history[-1].keys()
    still = [name for name, value in training.named_parameters() if name in before and torch.equal(value, before[name])]
    assert [name for name in still if not name.startswith("pupil")] == []  # nobody taught here


def test_what_is_written_loads_strictly_and_gives_the_same_features(training, tone_clips, tmp_path):
    checkpoint = write_configs(tmp_path)
    write_encoder(tmp_path, training)
    loaded = load_whisper(checkpoint.whisper, 4, "cpu", torch.float32)
    wave = tone_clips[0].heard()
    training.eval()
    [ours], [theirs] = training.whisper.encode([wave]), loaded.encode([wave])
    assert ours.shape == (tone_clips[0].tokens, 768)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)  # stored in float16


def test_judging_reads_the_features_that_serving_gives(training, tone_clips):
    characters, words = judge(
        training, [clip.item.text for clip in tone_clips[:3]], [c.heard() for c in tone_clips[:3]]
    )
    assert characters.items == words.items == 3
    nn.init.zeros_(training.letters.weight)
    nn.init.zeros_(training.letters.bias)
    training.letters.bias.data[letter_ids("a")[0]] = 1.0
    always_a, _ = judge(training, ["a", "b"], [tone_clips[0].heard()] * 2)
    assert always_a.rate == 0.5


def test_an_event_is_named_by_what_most_frames_say(training, tone_clips):
    nn.init.zeros_(training.events.weight)
    nn.init.zeros_(training.events.bias)
    training.events.bias.data[EVENTS.index("knock")] = 1.0
    assert name_event(training, tone_clips[0].heard()) == "knock"
