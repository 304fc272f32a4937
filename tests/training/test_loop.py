"""The loop: it learns, resumes to the same weights, averages, and stops at a loss that is not finite."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kimia.errors import CheckpointError, NumericsError
from training.loop import CURVE, HISTORY, STATE, Loop, Plan, averaged_weights, fast_products

pytestmark = pytest.mark.unit

PLAN = Plan(steps=40, learning_rate=0.1, warmup=5, report_every=10, average=0.9)


def line(start=0.0):
    """A line to be fitted."""
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, start)
    nn.init.zeros_(module.bias)
    return module


def losses_of(module):
    """Loss of a step: y = 3 x + 1 on points drawn by the step."""

    def losses(step):
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(step))
        return {"square": F.mse_loss(module(x), 3 * x + 1)}

    return losses


def loop(folder, plan=PLAN, module=None):
    module = module or line()
    return Loop("line", module, losses_of(module), plan, folder)


def test_it_learns_and_draws(tmp_path):
    run = loop(tmp_path, Plan(steps=150, learning_rate=0.1, warmup=5))
    progress = run.run()
    assert progress.step == 150
    assert progress.history[-1]["square"] < 0.01 * progress.history[0]["square"]
    assert run.module.weight.item() == pytest.approx(3.0, abs=0.05)
    assert (tmp_path / CURVE).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / HISTORY).read_text().splitlines()) == len(progress.history)


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = loop(tmp_path / "whole")
    whole.run()
    first = loop(tmp_path / "slices")
    for _ in range(17):
        first._step()
    first.save()
    second = loop(tmp_path / "slices", module=line(start=99.0))
    progress = second.run()
    assert progress.step == 40
    torch.testing.assert_close(second.module.weight, whole.module.weight, rtol=0, atol=0)
    torch.testing.assert_close(second.averaged["bias"], whole.averaged["bias"], rtol=0, atol=0)


def test_the_first_report_after_a_resumption_is_a_mean_of_its_own_steps(tmp_path):
    first = loop(tmp_path)
    for _ in range(17):
        first._step()
    first.save()
    second = loop(tmp_path)
    losses = second.losses
    second.losses = lambda step: {"square": losses(step)["square"] * 0 + step}
    rows = {row["step"]: row["square"] for row in second.run().history}
    assert rows[20] == 18.0  # of steps 17, 18 and 19
    assert rows[30] == 24.5


def test_a_slice_of_no_seconds_keeps_its_place(tmp_path):
    run = loop(tmp_path, Plan(steps=40, learning_rate=0.1, seconds=0.0))
    assert run.run().step == 0
    assert (tmp_path / STATE).exists()


def test_a_finished_run_does_nothing_more(tmp_path):
    loop(tmp_path).run()
    again = loop(tmp_path)
    assert again.run().step == 40
    assert again.averaged["weight"].item() != 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_what_was_done(tmp_path, bad):
    module = line()
    good = losses_of(module)
    run = Loop(
        "line", module, lambda step: good(step) if step < 7 else {"square": bad * module.weight.sum()}, PLAN, tmp_path
    )
    with pytest.raises(NumericsError, match=r"line: square is .* at step 7"):
        run.run()
    kept = loop(tmp_path)
    assert kept.resume()
    assert kept.progress.step == 7
    assert torch.isfinite(kept.module.weight).all()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    module = line(start=1.0)
    run = Loop("line", module, lambda step: {"root": (module.weight - 1.0).abs().sqrt().sum()}, PLAN, tmp_path)
    with pytest.raises(NumericsError, match="gradient"):
        run.run()


def test_a_state_of_another_module_is_refused(tmp_path):
    loop(tmp_path).run()
    with pytest.raises(CheckpointError, match="of another model"):
        loop(tmp_path, module=nn.Linear(2, 1)).resume()


def test_the_rate_warms_up_and_falls_to_its_floor(tmp_path):
    rates = [loop(tmp_path).rate(step) for step in range(41)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[5] == pytest.approx(0.1)
    assert rates[40] == pytest.approx(0.1 * PLAN.floor)


def test_averaged_weights_trail_the_trained_ones(tmp_path):
    run = loop(tmp_path)
    run.run()
    averaged = averaged_weights(tmp_path, line())
    assert not averaged.training
    assert 0 < averaged.weight.item() != run.module.weight.item()


def test_averaged_weights_of_no_run_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="train this stage first"):
        averaged_weights(tmp_path, line())


@pytest.mark.parametrize(("amx", "avx512", "fast"), [(True, False, True), (False, True, True), (False, False, False)])
def test_products_are_fast_where_the_processor_has_them(monkeypatch, amx, avx512, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    with fast_products(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (torch.bfloat16 if fast else torch.float32)


def test_fast_products_leave_attention_in_float32(monkeypatch):
    monkeypatch.setattr("training.loop.multiplies_bfloat16", lambda: True)
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with fast_products(torch.device("cpu")):
        assert (q @ q.transpose(-1, -2)).dtype is torch.bfloat16
        mixed = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), q.bfloat16(), q, is_causal=True)
    assert mixed.dtype is torch.float32
    mixed.sum().backward()
    assert q.grad is not None
