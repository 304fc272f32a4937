"""The engine against the plain twin, `solve` and `commit`; chunks solved together against each alone."""

from dataclasses import replace

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.chunking import pushes
from kimia.model.detokenize import Detokenizer
from kimia.model.flow import commit, solve, time_grid
from kimia.model.flow_engine import FlowEngine
from kimia.model.presets import LOW_LATENCY, UPSTREAM
from tests.model.tiny_detokenizer import FLOW, counted_noise, random_detokenizer

pytestmark = pytest.mark.parity

QUICK = replace(LOW_LATENCY, ode_points=4)
LATE = replace(UPSTREAM, ode_points=3)
POSITIONS = [FLOW, replace(FLOW, position_embedding="learnable"), replace(FLOW, use_rope=False)]


def codes(count: int, start: int) -> list[int]:
    return [(start + 3 * index) % FLOW.audio_codes for index in range(count)]


def alone(detokenizer: Detokenizer, turns) -> list[torch.Tensor]:
    return [detokenizer.synthesize(tokens, preset, seed) for seed, (tokens, preset) in enumerate(turns)]


def together(detokenizer: Detokenizer, turns, joins: int = 0, most: int = 9) -> list[torch.Tensor]:
    """All turns at once; each begins `joins` evaluations after the one before, in the middle of its chunk.

    At most `most` are in one evaluation, in turns.
    """
    engine = FlowEngine(detokenizer.dit)
    waves: list[list[torch.Tensor]] = [[] for _ in turns]
    waiting = [list(pushes(preset, tokens)) for tokens, preset in turns]
    streams = [detokenizer.stream(preset, seed) for seed, (_, preset) in enumerate(turns)]
    begun, evaluations = {}, 0
    while begun or any(waiting):
        for number, stream in enumerate(streams):
            if number not in begun and waiting[number] and evaluations >= number * joins:
                push = waiting[number].pop(0)
                begun[number] = stream.begin(push.tokens, push.final)
        solvings = [each.solving for each in begun.values() if each.solving and not each.solving.done]
        if solvings:
            engine.advance(
                [solvings[(evaluations + index) % len(solvings)] for index in range(min(most, len(solvings)))]
            )
        evaluations += 1
        for number, each in list(begun.items()):
            if each.solving is None or each.solving.done:
                waves[number].append(streams[number].finish(begun.pop(number)))
    return [torch.cat(wave) for wave in waves]


@pytest.mark.parametrize("preset", [QUICK, LATE, replace(QUICK, look_ahead=0)])
def test_a_turn_is_the_plain_twins(preset):
    """Push by push, behind a window that moves: `solve` from a prefix that is copied, modulation of every frame."""
    detokenizer, preset = random_detokenizer(), replace(preset, kv_window=70)
    dit, grid, tokens = detokenizer.dit, time_grid(preset.ode_points, preset.solver), codes(95, 0)
    stream, prefix, start, left = detokenizer.stream(preset, seed=1, noise=counted_noise), dit.empty_prefix(), 0, ()
    for index, push in enumerate(pushes(preset, tokens)):
        stream.push(push.tokens, push.final)
        ids = left + push.tokens
        kept = 4 * (len(ids) if push.final else len(ids) - preset.look_ahead)
        chunk = dit.chunk(torch.tensor([ids]).repeat_interleave(4, 1), 1, start, prefix)
        x = solve(dit, counted_noise(index, (4 * len(ids), FLOW.mel_bins))[None], chunk, grid)[:, :kept]
        if preset.look_ahead and not push.final:
            commit(dit, x, chunk.head(kept))
        torch.testing.assert_close(stream.report.mel, 2.0 * x[0] - 1.5, atol=1e-4, rtol=0)
        stop = prefix.frames + kept
        prefix, left = chunk.cache.span(max(0, stop - 70), stop), ids[kept // 4 :]
        start += kept
        if not push.final:
            torch.testing.assert_close(stream._state.heard.cache.held.keys, prefix.keys, atol=1e-4, rtol=0)
            torch.testing.assert_close(stream._state.heard.cache.held.values, prefix.values, atol=1e-4, rtol=0)
    assert index >= 3


@pytest.mark.parametrize("preset", [QUICK, LATE, replace(QUICK, look_ahead=0)])
def test_evaluation_by_evaluation_it_is_the_same_bit_for_bit(preset):
    """Turns that take turns, one chunk in each evaluation: as on a CPU."""
    detokenizer = random_detokenizer()
    turns = [(codes(60, 0), preset), (codes(45, 3), QUICK)]
    for expected, got in zip(alone(detokenizer, turns), together(detokenizer, turns, most=1), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("config", POSITIONS, ids=["rope", "learnable", "neither"])
@pytest.mark.parametrize("joins", [0, 5], ids=["at once", "one by one"])
def test_neighbours_change_no_sample_beyond_rounding(config, joins):
    """Other lengths, prefixes, presets, time grids: what runs beside a turn is nothing to it."""
    detokenizer = random_detokenizer(config=config)
    turns = [(codes(60, 0), QUICK), (codes(37, 1), LATE), (codes(3, 2), QUICK), ([], QUICK), (codes(50, 5), QUICK)]
    for expected, got in zip(alone(detokenizer, turns), together(detokenizer, turns, joins), strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-4 if len(got) else True


def test_a_chunk_that_is_not_solved_does_not_end():
    detokenizer = random_detokenizer()
    stream = detokenizer.stream(QUICK, seed=1)
    begun = stream.begin(codes(12, 0))
    with pytest.raises(ParameterError, match="when its chunk is solved"):
        stream.finish(begun)
    detokenizer.engine.solve(begun.solving)
    stream.finish(begun)
    with pytest.raises(ParameterError, match="before the next one begins"):
        stream.finish(begun)


def test_a_push_that_begins_anew_takes_the_place_of_the_first():
    detokenizer = random_detokenizer()
    expected = detokenizer.stream(QUICK, seed=0).push(codes(12, 0), final=True)
    stream = detokenizer.stream(QUICK, seed=0)
    first, second = stream.begin(codes(12, 0), final=True), stream.begin(codes(12, 0), final=True)
    for begun in (first, second):
        detokenizer.engine.solve(begun.solving)
    with pytest.raises(ParameterError, match="before the next one begins"):
        stream.finish(first)
    assert torch.equal(stream.finish(second), expected)


def test_times_are_embedded_once(monkeypatch):
    detokenizer = random_detokenizer()
    embedded = []
    embed = detokenizer.dit.embed_times

    def noted(times):
        embedded.append(times)
        return embed(times)

    monkeypatch.setattr(detokenizer.dit, "embed_times", noted)
    together(detokenizer, [(codes(60, 0), QUICK), (codes(60, 0), QUICK)])
    assert sorted(embedded) == [(0, 333, 666), (999,)]
