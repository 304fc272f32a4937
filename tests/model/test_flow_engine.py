"""Chunks solved together against the plain twin, which solves one after the other."""

from dataclasses import replace

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.chunking import pushes
from kimia.model.detokenize import Detokenizer
from kimia.model.flow_engine import FlowEngine
from kimia.model.presets import LOW_LATENCY, UPSTREAM
from tests.model.tiny_detokenizer import FLOW, random_detokenizer

pytestmark = pytest.mark.parity

QUICK = replace(LOW_LATENCY, ode_points=4)
LATE = replace(UPSTREAM, ode_points=3)
POSITIONS = [FLOW, replace(FLOW, position_embedding="learnable"), replace(FLOW, use_rope=False)]


def codes(count: int, start: int) -> list[int]:
    return [(start + 3 * index) % FLOW.audio_codes for index in range(count)]


def plain(detokenizer: Detokenizer, turns) -> list[torch.Tensor]:
    return [detokenizer.synthesize(tokens, preset, seed) for seed, (tokens, preset) in enumerate(turns)]


def together(detokenizer: Detokenizer, turns, joins: int = 0) -> list[torch.Tensor]:
    """All turns at once; each begins `joins` evaluations after the one before, in the middle of its chunk."""
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
            engine.advance(solvings)
        evaluations += 1
        for number, each in list(begun.items()):
            if each.solving is None or each.solving.done:
                waves[number].append(streams[number].finish(begun.pop(number)))
    return [torch.cat(wave) for wave in waves]


@pytest.mark.parametrize("preset", [QUICK, LATE, replace(QUICK, look_ahead=0)])
def test_alone_it_is_the_plain_twin_bit_for_bit(preset):
    detokenizer = random_detokenizer()
    turns = [(codes(60, 0), preset)]
    [expected], [got] = plain(detokenizer, turns), together(detokenizer, turns)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("config", POSITIONS, ids=["rope", "learnable", "neither"])
@pytest.mark.parametrize("joins", [0, 5], ids=["at once", "one by one"])
def test_neighbours_change_no_sample_beyond_rounding(config, joins):
    """Other lengths, prefixes, presets, time grids: what runs beside a turn is nothing to it."""
    detokenizer = random_detokenizer(config=config)
    turns = [(codes(60, 0), QUICK), (codes(37, 1), LATE), (codes(3, 2), QUICK), ([], QUICK), (codes(50, 5), QUICK)]
    for expected, got in zip(plain(detokenizer, turns), together(detokenizer, turns, joins), strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-4 if len(got) else True


def test_a_chunk_that_is_not_solved_does_not_end():
    detokenizer = random_detokenizer()
    stream = detokenizer.stream(QUICK, seed=1)
    begun = stream.begin(codes(12, 0))
    with pytest.raises(ParameterError, match="when its chunk is solved"):
        stream.finish(begun)
    other = stream.begin(codes(12, 0))
    engine = FlowEngine(detokenizer.dit)
    while not other.solving.done:
        engine.advance([begun.solving, other.solving])
    stream.finish(begun)
    with pytest.raises(ParameterError, match="before the next one ends"):
        stream.finish(other)


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
