"""What is counted as heard, as silence, and as a stall."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.player import Dry, Player, played, unexplained, union, within

pytestmark = pytest.mark.unit

# Eighths of a second: sums are exact.
eighths = st.integers(0, 40).map(lambda n: n / 8)
pieces = st.lists(st.tuples(eighths, st.integers(1, 24).map(lambda n: n / 8)), min_size=1, max_size=12)
intervals = st.lists(st.tuples(eighths, eighths).map(lambda t: (t[0], t[0] + t[1])), max_size=8)


def arriving(gaps_and_lengths):
    now, arrivals = 0.0, []
    for gap, seconds in gaps_and_lengths:
        now += gap
        arrivals.append((now, seconds))
    return arrivals


def test_a_piece_in_time_is_no_silence():
    player = played([(10.0, 1.0), (10.5, 1.0), (12.0, 1.0)])
    assert player.dry == []
    assert player.gaps == [0.5, 1.5]
    assert player.reserves == [0.5, 0.0]
    assert player.dry_at == 13.0


def test_a_late_piece_is_a_silence_up_to_it():
    player = played([(10.0, 1.0), (11.5, 1.0), (12.0, 0.5), (14.0, 0.5)])
    assert player.dry == [Dry(11.0, 11.5, 10.0), Dry(13.0, 14.0, 12.0)]
    assert player.dry_at == 14.5


def test_nothing_is_missing_before_the_first_piece_and_after_the_last():
    player = Player()
    player.stop(5.0)
    assert player.heard(6.0) == 0.0
    player.feed(10.0, 1.0)
    assert player.dry == []
    assert player.heard(10.25) == 0.25
    assert player.heard(99.0) == 1.0


def test_who_interrupts_a_silence_has_heard_it():
    arrivals = [(10.0, 1.0), (12.0, 1.0)]
    assert played(arrivals, stopped=11.5).dry == [Dry(11.0, 11.5, 10.0)]
    assert played(arrivals, stopped=10.5).dry == []  # what came after that was heard by nobody


@given(pieces)
def test_time_is_either_heard_or_silent(given_pieces):
    arrivals = arriving(given_pieces)
    player = played(arrivals)
    begun, spoken = arrivals[0][0], sum(seconds for _, seconds in arrivals)
    assert player.fed == spoken
    assert player.dry_at - begun == spoken + sum(dry.seconds for dry in player.dry)
    assert player.heard(player.dry_at) == spoken


@given(pieces)
def test_silences_do_not_overlap_and_end_with_a_piece(given_pieces):
    arrivals = arriving(given_pieces)
    dry = played(arrivals).dry
    assert {silence.end for silence in dry} <= {at for at, _ in arrivals}
    assert all(silence.since <= silence.begin < silence.end for silence in dry)
    assert all(before.end <= after.begin for before, after in pairwise(dry))


def test_stalls_explain_no_more_than_their_length():
    late = Dry(begin=11.0, end=12.0, since=10.0)
    assert unexplained(late, []) == 1.0
    assert unexplained(late, [(10.25, 10.75)]) == 0.5  # before the player ran dry, but the piece was on its way
    assert unexplained(late, [(9.0, 10.25), (11.75, 20.0)]) == 0.5
    assert unexplained(late, [(10.0, 12.0)]) == 0.0
    assert unexplained(late, [(8.0, 10.0), (12.0, 13.0)]) == 1.0


@given(intervals, eighths, eighths)
def test_a_union_counts_every_moment_once(given_intervals, begin, length):
    end = begin + length
    merged = union(given_intervals)
    moments = [begin + (n + 0.5) / 8 for n in range(int(8 * length))]
    covered = sum(any(low < at < high for low, high in given_intervals) for at in moments) / 8
    assert within(merged, begin, end) == covered
    assert all(a[1] < b[0] for a, b in pairwise(merged))
