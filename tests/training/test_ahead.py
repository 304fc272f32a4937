"""Data made ahead: the same bits as without helpers, in order, errors when they are due, no draw of the trainer's."""

import pytest
import torch

from kimia.errors import AudioError
from training.ahead import Ahead, is_helper, made, spare_cores
from training.hearing import Hearing
from training.speaking import Speaking

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # Python 3.12 and later
]


def test_a_batch_is_the_same_bit_for_bit(configs, tone_clips):
    hearing = Hearing(tone_clips, lambda clip: torch.ones(400, 384), configs.vq_features, configs, seed=1)
    clips = [clip for clip in tone_clips if clip.item.voice == "hibari"]
    speaking = Speaking(clips, None, configs.flow, configs.vocoder, seed=1)

    def make(step):
        return hearing.batch(step, 3), hearing.windows(step, 1), speaking.batch(step, 2)

    for step, (batch, window, spoken) in zip((3, 4), made(make, (3, 4), 1), strict=True):
        own_batch, own_window, own_spoken = make(step)
        pairs = [(batch, own_batch), (window, own_window), *zip(spoken, own_spoken, strict=True)]
        for theirs, ours in pairs:
            assert vars(theirs).keys() == vars(ours).keys()
            assert all(torch.equal(value, vars(ours)[name]) for name, value in vars(theirs).items())


def test_a_run_may_begin_anywhere_and_again():
    data = Ahead(lambda step: (step, is_helper()), 6, 2)
    assert [data(step) for step in (2, 3, 4, 0, 1)] == [(step, True) for step in (2, 3, 4, 0, 1)]
    assert Ahead(lambda step: (step, is_helper()), 6, 0)(2) == (2, False)


def test_the_trainer_s_draws_are_its_own():
    drawn = []
    for workers in (0, 1):
        torch.manual_seed(5)
        assert list(made(str, range(3), workers)) == ["0", "1", "2"]
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_an_error_comes_when_its_number_is_due():
    def make(number):
        if number == 2:
            raise AudioError(f"clip {number} is broken")
        return number

    found = made(make, range(4), 1)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(AudioError, match="clip 2 is broken"):
        next(found)


def test_nothing_to_make_is_made_at_once():
    assert list(made(str, range(0), 1)) == []


@pytest.mark.parametrize(("cores", "spare"), [(1, 0), (2, 0), (16, 15)])
def test_two_cores_have_none_to_spare(monkeypatch, cores, spare):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert spare_cores() == spare
