"""The search for a cheaper preset, on a small random model."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.calibrate import (
    Calibration,
    Measured,
    Space,
    best_cuts,
    best_grid,
    own_preset,
    spectral_distances,
    spoken_mel,
    sway_times,
    word_errors,
)
from kimia.model.chunking import pushes
from kimia.model.presets import LOW_LATENCY, UPSTREAM
from tests.model.tiny_detokenizer import FLOW, counted_noise, random_detokenizer

pytestmark = pytest.mark.parity

CODES = [3 * index % FLOW.audio_codes for index in range(45)]
SMALL = Space(steps=(2, 6), sways=(0.0, -0.5), look_aheads=(4, 6), growths=((6, 12, 24, 37), (6, 9)), limit=1.0)


def measured(distance: float, tflop: float = 1.0, commits=(6, 12), look_ahead: int = 4) -> Measured:
    return Measured("grid", own_preset("x", commits, look_ahead, (0.0, 1.0)), 0.0, distance, tflop)


def test_times_are_even_or_closer_together_at_one_end():
    assert sway_times(4, 0.0) == (0, 0.25, 0.5, 0.75, 1)
    early, late = sway_times(4, -1.0), sway_times(4, 0.5)
    assert early[2] == pytest.approx(1 - math.cos(math.pi / 4))
    assert early[2] < 0.5 < late[2]
    for times in (early, late, sway_times(50, 1.75)):
        assert (times[0], times[-1]) == (0, 1)
        assert all(one < other for one, other in itertools.pairwise(times))


def test_a_mel_is_what_the_stream_commits():
    detokenizer = random_detokenizer()
    preset = replace(LOW_LATENCY, ode_points=3)
    stream, mels = detokenizer.stream(preset, 0, counted_noise), []
    for push in pushes(preset, CODES):
        stream.push(push.tokens, push.final)
        mels.append(stream.report.mel)
    assert torch.equal(spoken_mel(detokenizer, CODES, preset, counted_noise), torch.cat(mels))


def test_distance_is_in_decibels():
    mel = torch.zeros(3, 5)
    louder = mel + math.log(10) / 20  # every bin by 1 dB
    assert spectral_distances(mel, louder).tolist() == pytest.approx([1.0] * 3)


def test_noise_belongs_to_the_frame_whatever_the_cuts():
    calibration = Calibration(random_detokenizer(), [CODES], SMALL, "found")
    ours, theirs = (calibration._noise(0, CODES, preset) for preset in (LOW_LATENCY, UPSTREAM))
    whole = theirs(0, (180, FLOW.mel_bins))
    assert torch.equal(ours(2, (28, FLOW.mel_bins)), whole[72 : 72 + 28])  # behind 6 and 12 tokens
    assert torch.equal(theirs(1, (40, FLOW.mel_bins)), whole[72 : 72 + 40])  # behind 18


def test_the_cheapest_grid_within_the_limit_is_taken():
    grids = [measured(3.0, 1), measured(0.9, 2), measured(0.8, 2), measured(0.1, 3)]
    assert best_grid(grids, limit=1.0) is grids[2]
    assert best_grid(grids, limit=0.05) is grids[3]  # none is within: the nearest


def test_cuts_are_neither_farther_nor_later_than_the_first():
    own = measured(2.0, 5, (6, 12), 4)
    worse, later = measured(2.1, 1, (6, 12), 2), measured(1.0, 1, (8, 12), 4)
    cheaper = measured(1.9, 4, (6, 18), 4)
    assert best_cuts([own, worse, later]) is own
    assert best_cuts([own, worse, later, cheaper]) is cheaper


def test_a_search_measures_everything_and_ends_with_what_to_take():
    calibration = Calibration(random_detokenizer(), [CODES, [], CODES[:7]], SMALL, "found")
    runs = list(calibration.search())
    *candidates, chosen = [run for run in runs if run is not None]
    assert len(runs) == calibration.runs + 1
    assert [one.part for one in candidates] == ["grid"] * 4 + ["cuts"] * 4
    grids, cuts = candidates[:4], candidates[4:]
    assert [(one.steps, one.sway) for one in grids] == [(2, 0.0), (2, -0.5), (6, 0.0), (6, -0.5)]
    assert min(one.distance for one in grids[2:]) < min(one.distance for one in grids[:2])  # more steps are nearer
    assert grids[0].tflop < grids[2].tflop
    assert chosen in cuts
    assert chosen.file.times == best_grid(grids, SMALL.limit).file.times
    assert chosen.file.schedule.name == "found"


def test_as_many_even_steps_as_the_reference_have_no_distance():
    space = replace(SMALL, steps=(29,), sways=(0.0,))
    runs = list(Calibration(random_detokenizer(), [CODES[:12]], space, "found").search())
    assert runs[1].distance < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"steps": ()},
        {"steps": (1,)},
        {"steps": (200,)},
        {"sways": (-1.5,)},
        {"sways": (2.0,)},
        {"limit": -1.0},
        {"limit": float("nan")},
    ],
)
def test_impossible_searches_are_refused(change):
    with pytest.raises(ParameterError):
        replace(SMALL, **change)


def test_what_cannot_be_tried_is_refused_before_anything_is_computed():
    for space, name in (
        (replace(SMALL, growths=((2, 9),)), "x"),
        (replace(SMALL, look_aheads=(-1,)), "x"),
        (SMALL, ""),
    ):
        with pytest.raises(ParameterError):
            Calibration(random_detokenizer(), [CODES], space, name)
    with pytest.raises(ParameterError, match="no codes"):
        Calibration(random_detokenizer(), [[]], SMALL, "x")


def test_word_errors():
    assert word_errors("The order, please!", "the order please") == (0, 3)
    assert word_errors("the order please", "an order") == (2, 3)
    assert word_errors("", "noise") == (1, 0)
