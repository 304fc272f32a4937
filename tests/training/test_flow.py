"""The flow model's trainer: chunks as they are pushed, the same numbers as serving, gradients through the prefix."""

import random
from itertools import pairwise

import pytest
import torch

from kimia.model.dit import load_dit
from kimia.model.flow import commit
from training.config import write_configs
from training.flow import FlowTraining, Recipe, cuts, write_flow
from training.loop import Loop, Plan
from training.speaking import Speaking

pytestmark = pytest.mark.unit

SHORT = Recipe(presets=0, commits=(2, 3), look_aheads=(1,))


@pytest.fixture
def training(configs):
    torch.manual_seed(0)
    made = FlowTraining(configs.flow, SHORT)
    for parameter in made.dit.parameters():  # away from the zeros that training begins with
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def test_chunks_cover_a_clip_once_and_look_ahead_as_pushes_do():
    for seed in range(20):
        found = list(cuts(random.Random(seed), 50, Recipe()))
        assert found[0][0] == 0
        assert found[-1][1:] == (50, 50)
        for (_, kept, end), (begin, _, _) in pairwise(found):
            assert begin == kept
            assert end - kept in (4, 12)


def test_half_of_the_clips_are_cut_exactly_as_a_preset_cuts():
    low_latency = [(0, 6, 10), (6, 18, 22), (18, 42, 46), (42, 50, 50)]
    upstream = [(0, 18, 30), (18, 50, 50)]
    found = [list(cuts(random.Random(seed), 50, Recipe())) for seed in range(60)]
    assert 6 < found.count(low_latency) < 24
    assert 6 < found.count(upstream) < 24


def test_a_clip_shorter_than_a_push_is_one_final_chunk():
    assert list(cuts(random.Random(0), 5, Recipe())) == [(0, 5, 5)]


@torch.no_grad()
def test_a_chunk_behind_a_prefix_gives_what_serving_gives(training, monkeypatch):
    monkeypatch.setattr("training.loop.multiplies_bfloat16", lambda: False)  # float32, as serving on a CPU
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(512, (1, 6), generator=generator)
    mel, x = (torch.randn(1, frames, 80, generator=generator) for frames in (16, 8))
    time = training.dit.embed_times((500,))

    prefix = training.committed(mel, codes[:, :4], 0, training.empty(1))
    ours = training.dit(x, time, training.chunk(codes[:, 4:], 16, prefix))

    dit = training.dit
    first = dit.chunk(codes[:, :4], 4, 0, dit.empty_prefix())
    commit(dit, mel, first)
    theirs = dit(x, time, dit.chunk(codes[:, 4:], 4, 16, first.cache))
    torch.testing.assert_close(ours, theirs)


def test_gradients_pass_through_the_prefix(training):
    codes = torch.zeros(1, 4, dtype=torch.long)
    mel = torch.randn(1, 8, 80).requires_grad_()
    prefix = training.committed(mel, codes[:, :2], 0, training.empty(1))
    chunk = training.chunk(codes[:, 2:], 8, prefix)
    training.matching(torch.randn(1, 8, 80), chunk, torch.Generator()).mean().backward()
    assert mel.grad.abs().sum() > 0


def test_steps_run_and_the_loss_falls(configs, tone_clips, tmp_path):
    torch.manual_seed(0)
    training = FlowTraining(configs.flow, SHORT)
    clips = [clip for clip in tone_clips if clip.item.voice == "hibari"]
    speaking = Speaking(clips, None, configs.flow, configs.vocoder, seed=1)
    plan = Plan(steps=8, learning_rate=2e-3, warmup=1, report_every=1)
    batch = speaking.batch(0, 2)
    history = Loop("flow", training, lambda step: training.losses(batch, 0), plan, tmp_path).run().history
    assert history[-1]["velocity"] < history[0]["velocity"]


def test_some_codes_are_wrong(configs):
    made = FlowTraining(configs.flow, Recipe(wrong_codes=0.5))
    codes = torch.full((4, 100), 7)
    changed = made._disturbed(codes, torch.Generator().manual_seed(0)) != codes
    assert 0.4 < changed.float().mean() < 0.6


def test_what_is_written_loads_strictly(training, tmp_path):
    checkpoint = write_configs(tmp_path)
    write_flow(tmp_path, training)
    loaded = load_dit(checkpoint.flow, "cpu", torch.float32)
    for name, value in training.dit.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
