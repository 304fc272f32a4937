"""Every trainer on another device: nothing is left on the CPU, losses are the same, resumed states follow."""

import random

import pytest
import torch
from torch import nn

from kimia.model.lm import Row
from tests.training.elsewhere import ELSEWHERE, elsewhere
from training.codebook import CodeTraining, Recipe
from training.encoders import EncoderTraining
from training.flow import FlowTraining
from training.flow import Recipe as FlowRecipe
from training.hearing import Hearing
from training.language_model import LanguageTraining, Lesson
from training.loop import Loop, Plan, averaged_weights, device_of
from training.speaking import Speaking
from training.study import TaughtCodes
from training.teacher import TEACHER_WIDTH
from training.vocoder import VocoderTraining
from training.vq import VQTraining

pytestmark = pytest.mark.unit

STATES = torch.randn(400, TEACHER_WIDTH, generator=torch.Generator().manual_seed(0))
RESTARTING = Recipe(0, restart_every=1)


def encoder(configs, clips):
    hearing = Hearing(clips, lambda clip: STATES, configs.whisper_features, configs, seed=1)
    made = EncoderTraining(configs.whisper, configs.whisper_features)
    return made, lambda step: made.losses(hearing.windows(step, 1))


def study(configs, clips):
    hearing = Hearing(clips, lambda clip: STATES, configs.vq_features, configs, seed=1)
    made = TaughtCodes(configs.vq.codebook_size, configs.vq.encoder.d_model, 80, RESTARTING)
    made.kept = [torch.randn(512, configs.vq.encoder.d_model)]
    return made, lambda step: made.losses(hearing.batch(step, 4), step)


def tokenizer(configs, clips):
    hearing = Hearing(clips, lambda clip: STATES, configs.vq_features, configs, seed=1)
    guide, _ = study(configs, clips)
    guide.book.begin(torch.randn(512, configs.vq.encoder.d_model), rounds=1)
    made = VQTraining(configs.vq, configs.vq_features, configs.flow, RESTARTING)
    made.book.load_state_dict(guide.book.state_dict())
    made.guide = (guide,)
    return made, lambda step: made.losses(hearing.batch(step, 2), step)


def speaking(configs, clips):
    return Speaking([clip for clip in clips if clip.item.voice == "hibari"], None, configs.flow, configs.vocoder, 1)


def vocoder(configs, clips):
    made, data = VocoderTraining(configs.vocoder, configs.flow), speaking(configs, clips)
    return made, lambda step: made.losses(data.batch(step, 1), step)


def flow(configs, clips):
    made, data = FlowTraining(configs.flow, FlowRecipe(commits=(2, 3), look_aheads=(1,))), speaking(configs, clips)
    return made, lambda step: made.losses(data.batch(step, 2), step)


def language(configs, clips):
    rng, config = random.Random(0), configs.lm
    ids = [rng.randrange(100) for _ in range(9)]
    heard = Lesson(Row(ids, ids, [(2, 4)], [STATES[:4].repeat(1, 2)]), (*ids[:5], -1, -1, -1, -1), (-1,) * 9)
    spoken = Lesson(Row(ids[:6], ids[:6], [], None), (-1,) * 6, tuple(config.token_offset + n for n in range(6)))
    made = LanguageTraining(config)
    return made, lambda step: made.losses([heard, spoken])


def built(case, configs, clips):
    """A trainer's module and losses, the same every time."""
    torch.manual_seed(0)
    return case(configs, clips)


def losses_of(module, losses, device, folder):
    """The losses of a step of a trainer on a device."""
    torch.manual_seed(0)
    if isinstance(module, CodeTraining):
        module.kept = [states.to(device) for states in module.kept]
    if isinstance(module, VQTraining):
        module.guide[0].to(device)
    found = []

    def kept(step):
        found.append(losses(step))
        return found[-1]

    loop = Loop("trainer", module, kept, Plan(1, 1e-3, device=device), folder)
    loop._step()
    moments = [value for state in loop.optimiser.state.values() for value in state.values() if value.dim()]
    tensors = [*module.state_dict().values(), *loop.averaged.values(), *moments, *found[0].values()]
    assert {tensor.device for tensor in tensors} == {device}
    return {name: float(value.detach()) for name, value in found[0].items()}


@pytest.mark.parametrize("case", [encoder, study, tokenizer, vocoder, flow, language])
def test_a_step_elsewhere_is_the_same_step(configs, tone_clips, tmp_path, monkeypatch, case):
    monkeypatch.setattr("training.loop.multiplies_bfloat16", lambda: False)  # float32 on either
    here = losses_of(*built(case, configs, tone_clips), torch.device("cpu"), tmp_path)
    again = built(case, configs, tone_clips)
    with elsewhere() as device:
        there = losses_of(*again, device, tmp_path)
    assert there == pytest.approx(here, rel=1e-3, abs=1e-5)


def test_a_tensor_left_behind_is_found():
    with elsewhere() as device:
        layer = nn.Linear(2, 2).to(device)
        layer(torch.zeros(1, 2, device=device))
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.zeros(1, 2))
        with pytest.raises(RuntimeError, match="same device"):
            torch.arange(2) + layer.bias


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # no such no-op: elsewhere has numbers
def test_a_run_of_the_cpu_goes_on_elsewhere_and_comes_back(tmp_path):
    def loop(device):
        module = nn.Linear(3, 1)
        data = torch.ones(2, 3)
        return Loop("line", module, lambda step: {"sum": module(data.to(device)).square().mean()},
                    Plan(4, 0.1, device=device), tmp_path)  # fmt: skip

    first = loop(torch.device("cpu"))
    first._step()
    first.save()
    with elsewhere() as device:
        second = loop(device)
        assert second.resume()
        assert device_of(second.module) == ELSEWHERE
        assert second.averaged["weight"].device == ELSEWHERE
        second._step()
    first._step()
    torch.testing.assert_close(second.module.cpu().weight, first.module.weight)
    torch.testing.assert_close(second.averaged["weight"].held, first.averaged["weight"])
    assert device_of(averaged_weights(tmp_path, nn.Linear(3, 1))).type == "cpu"
