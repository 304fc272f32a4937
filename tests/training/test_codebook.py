"""Codebook arithmetic, the head, and the mel that counts."""

import pytest
import torch

from training.codebook import Codebook, CodeTraining, Head, Recipe, mel_loss
from training.hearing import Hearing

pytestmark = pytest.mark.unit


@pytest.fixture
def hearing(configs, tone_clips):
    return Hearing(tone_clips, None, configs.vq_features, configs, seed=1)


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


def test_a_run_that_goes_on_waits_for_as_many_states_as_codes():
    torch.manual_seed(0)
    training, real = CodeTraining(64, 8, 80, Recipe(continuous_steps=0)), torch.ones(1, 40, dtype=torch.bool)
    hidden = torch.randn(1, 40, 8)
    assert training._quantised(hidden, real, 5)[0] is hidden
    assert not training.book.ready
    assert training._quantised(hidden, real, 6)[0] is not hidden
    assert training.book.ready


def test_the_head_gives_four_frames_a_code():
    letters, mel = Head(16, 80)(torch.zeros(2, 5, 16))
    assert letters.shape == (2, 20, 29)
    assert mel.shape == (2, 20, 80)


def test_the_mel_counts_only_where_there_is_a_target(configs, hearing):
    batch = hearing.batch(0, 8)
    exact = mel_loss(batch.spoken, batch)
    assert exact == 0
    assert mel_loss(batch.spoken + 1.0, batch) == pytest.approx(1.0, abs=1e-5)


def test_codes_stand_still_at_first(hearing):
    torch.manual_seed(0)
    training = CodeTraining(8, 4, 80, Recipe(continuous_steps=0, still_steps=2))
    batch = hearing.batch(0, 4)
    states = torch.randn(4, batch.frames.shape[1] // 4, 4)
    training.book.begin(torch.randn(64, 4))
    begun = training.book.rows.clone()
    training.code_losses(states, batch, 1)
    torch.testing.assert_close(training.book.rows, begun, rtol=0, atol=0)
    training.code_losses(states, batch, 2)
    assert not torch.equal(training.book.rows, begun)
