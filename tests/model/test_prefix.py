"""What is kept between turns: found by its contents, equal bit by bit to what a whole prefill gives, and bounded."""

import dataclasses
import random

import pytest
import torch

from kimia.model.engine import Answer, Engine, context_bytes
from kimia.model.generate import GenerateOptions
from kimia.model.lm import DualTrackLM, Row
from kimia.model.prefix import Prefix, Prefixes, content_of
from kimia.model.turn_cache import TurnCache
from tests.model.tiny_lm import TOKENS, WIDE, random_lm, random_row

pytestmark = pytest.mark.parity

BOTH, TEXT, SAY = {}, {"output_type": "text"}, {"forced_text": (7, 8, 9)}
WHOLE = random_row(300, seed=5, segments=((3, 50), (100, 60), (210, 30)))  # a conversation as its last prompt has it
FIRST, HISTORY = 180, 205  # positions of an earlier turn's prompt, and of the history with its answer


@pytest.fixture(scope="module")
def lm() -> DualTrackLM:
    return random_lm(WIDE, seed=3)


@pytest.fixture
def engine(lm: DualTrackLM) -> Engine:
    return Engine(lm, 3, Prefixes(2 * context_bytes(lm)))


def cut(row: Row, begin: int, end: int) -> Row:
    """Positions begin..end of a conversation, with the features of the clips that lie there as a whole."""
    inside = [place for place, (start, codes) in enumerate(row.segments) if begin <= start and start + codes <= end]
    segments = [(row.segments[place][0] - begin, row.segments[place][1]) for place in inside]
    features = [row.features[place] for place in inside]
    return Row(row.audio_ids[begin:end], row.text_ids[begin:end], segments, features or None)


def read(engine: Engine, prompt: Row, conversation: str = "c", **more) -> Answer:
    options = GenerateOptions(**{"output_type": "both", "max_steps": 8, "seed": 4, **more})
    answer = engine.begin(prompt, TOKENS, options, conversation)
    while answer.waits_for_prefill:
        engine.prefill(answer)
    return answer


def answered(engine: Engine, answer: Answer) -> list[tuple]:
    """Its steps, in company of nobody."""
    steps = []
    while not answer.over:
        steps += engine.step([answer])
    return steps


def first_turn(engine: Engine, whole: Row = WHOLE, after: int = HISTORY, ahead: bool = True, **more) -> None:
    """A turn, and what is read after it: the history up to `after`."""
    answer = read(engine, cut(whole, 0, FIRST), **more)
    answered(engine, answer)
    engine.keep(answer, cut(whole, FIRST, after))
    while ahead and engine.read_ahead("c"):
        pass


def assert_as_alone(engine: Engine, answer: Answer, prompt: Row, **more) -> None:
    """Every number that the turn has in its cache, and every step that follows, is that of a whole prefill."""
    alone = read(engine, prompt, "", **more)
    slots = range(WIDE.layers + WIDE.mimo_layers)
    if not alone.tracks.speaks:
        slots = range(WIDE.layers)
    elif not alone.tracks.draws_text:
        slots = [*range(WIDE.fork_layer + 1), *range(WIDE.layers, WIDE.layers + WIDE.mimo_layers)]
    for slot in slots:
        mine, other = (each.cache._store[slot, ..., : each.cache.length, :] for each in (answer, alone))
        assert torch.equal(mine, other), slot
    assert answer.cache.length == alone.cache.length
    assert answered(engine, answer) == answered(engine, alone)


# ---- the same numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "then", "reused"),
    [
        (BOTH, BOTH, 192),
        (BOTH, TEXT, 192),
        (BOTH, SAY, 192),
        (TEXT, TEXT, 192),
        (TEXT, BOTH, 0),  # nothing of the audio branch is there
        (SAY, BOTH, 192),  # the text branch was read in idle time
        (SAY, SAY, 192),
    ],
    ids=["both", "both, text", "both, say", "text", "text, both", "say, both", "say"],
)
def test_the_next_turn_reads_only_what_is_new(before, then, reused, engine):
    first_turn(engine, **before)
    answer = read(engine, WHOLE, **then)
    assert answer.reused == reused
    assert_as_alone(engine, answer, WHOLE, **then)


def test_before_anything_is_read_ahead_the_prompt_alone_serves(engine):
    first_turn(engine, ahead=False)
    answer = read(engine, WHOLE)
    assert answer.reused == 128
    assert_as_alone(engine, answer, WHOLE)


def test_reading_ahead_may_be_left_off_anywhere(engine):
    first_turn(engine, ahead=False, after=290)
    assert engine.read_ahead("c")
    answer = read(engine, WHOLE)
    assert answer.reused == 192
    assert not engine.read_ahead("c")
    assert_as_alone(engine, answer, WHOLE)


def test_what_was_not_heard_is_read_again(engine):
    """The history turned out shorter than it was expected: what follows the cut is another piece."""
    first_turn(engine, after=290)
    other = random_row(300, seed=6)
    heard = Row(WHOLE.audio_ids[:200] + other.audio_ids[200:], WHOLE.text_ids[:200] + other.text_ids[200:])
    heard = dataclasses.replace(heard, segments=WHOLE.segments[:2], features=WHOLE.features[:2])
    answer = read(engine, heard)
    assert answer.reused == 192
    assert_as_alone(engine, answer, heard)


def one_other(place: int) -> Row:
    """The conversation with another feature at a position."""
    features = [frames.clone() for frames in WHOLE.features]
    number = next(n for n, (start, codes) in enumerate(WHOLE.segments) if start <= place < start + codes)
    features[number][place - WHOLE.segments[number][0], 3] += 1e-6
    return dataclasses.replace(WHOLE, features=features)


@pytest.mark.parametrize(("place", "reused"), [(3, 0), (110, 64), (159, 128)])
def test_one_feature_that_differs_is_noticed(place, reused, engine):
    first_turn(engine)
    answer = read(engine, one_other(place))
    assert answer.reused == reused
    assert_as_alone(engine, answer, one_other(place))


@pytest.mark.parametrize("track", ["audio_ids", "text_ids"])
def test_one_id_that_differs_is_noticed(track, engine):
    first_turn(engine)
    ids = list(getattr(WHOLE, track))
    ids[70] = (ids[70] + 1) % 30
    answer = read(engine, dataclasses.replace(WHOLE, **{track: tuple(ids)}))
    assert answer.reused == 64


def test_another_conversation_shares_nothing(engine):
    first_turn(engine)
    assert read(engine, WHOLE, "other").reused == 0
    assert read(engine, WHOLE, "").reused == 0
    assert read(engine, WHOLE, "c").reused == 192


def test_a_prefix_is_given_away_once(engine):
    first_turn(engine)
    one, two = read(engine, WHOLE), read(engine, WHOLE)
    assert (one.reused, two.reused) == (192, 0)
    assert answered(engine, one) == answered(engine, two)


def test_a_turn_that_is_taken_up_again_begins_with_what_is_kept(engine):
    alone = answered(engine, read(engine, WHOLE, ""))
    first_turn(engine)
    logged = tuple((step.text_id, step.audio_id) for step in alone[:3])
    again = read(engine, WHOLE, replay=logged)
    assert again.reused == 192
    assert [(step.text_id, step.audio_id) for step in answered(engine, again)] == [
        (step.text_id, step.audio_id) for step in alone
    ]


@pytest.mark.parametrize("seed", range(6))
def test_any_conversation(seed, engine):
    """Turns of any length and kind, some left before they are read, with or without time between them."""
    chance = random.Random(seed)
    whole, end = random_row(480, seed=seed, segments=((30, 40), (170, 90), (330, 20))), 0
    bounds = {bound for start, codes in whole.segments for bound in range(start, start + codes + 1)}
    while (end := end + chance.randrange(40, 160)) < 470:
        if end in bounds:
            continue
        more = chance.choice([BOTH, BOTH, TEXT, SAY])
        answer = read(engine, cut(whole, 0, end), **more)
        assert_as_alone(engine, answer, cut(whole, 0, end), **more)
        engine.keep(answer, None if chance.random() < 0.3 else cut(whole, end, min(end + chance.randrange(9, 99), 480)))
        for _ in range(chance.randrange(4)):
            engine.read_ahead("c")


def test_the_room_of_a_cache_changes_nothing(engine):
    roomy = engine.begin(WHOLE, TOKENS, GenerateOptions("both", 8, seed=4))
    roomy.cache.reserve(500)
    while roomy.waits_for_prefill:
        engine.prefill(roomy)
    assert_as_alone(engine, roomy, WHOLE)


def test_nothing_is_kept_of_who_has_no_next_turn(engine, lm):
    engine.keep(read(engine, WHOLE, ""))
    assert len(engine.prefixes) == 0
    without = Engine(lm, 3)
    without.keep(read(without, WHOLE))
    assert len(without.prefixes) == 0
    assert read(without, WHOLE).reused == 0


# ---- what is kept -----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def prefix(conversation: str, pieces: int = 1) -> Prefix:
    """A prefix of some bytes: 2 x 4 x 256 positions x 2."""
    made = Prefix(TurnCache(1, 2, 4, torch.zeros(1)), conversation)
    made.cache.reserve(1)
    for piece in range(pieces):
        made.note((b"%d" % piece,), text=True, audio=True)
    return made


SIZE = prefix("").cache.nbytes


def test_the_ones_that_were_used_longest_ago_make_way():
    prefixes = Prefixes(3 * SIZE)
    for name in "abc":
        prefixes.keep(prefix(name))
    prefixes.keep(prefix("a"))  # used again
    prefixes.shrink(0)
    assert len(prefixes) == 3
    prefixes.shrink(SIZE + 1)
    assert [name for name in "abc" if prefixes.get(name)] == ["a"]
    prefixes.shrink(9 * SIZE)
    assert len(prefixes) == prefixes.nbytes == 0


def test_nothing_is_kept_for_ever():
    clock = Clock()
    prefixes = Prefixes(9 * SIZE, life=60, clock=clock)
    prefixes.keep(prefix("a"))
    clock.now += 59
    prefixes.keep(prefix("b"))
    prefixes.expire()
    assert len(prefixes) == 2
    clock.now += 1
    prefixes.expire()
    assert [name for name in "ab" if prefixes.get(name)] == ["b"]


def test_what_is_dropped_is_gone():
    prefixes = Prefixes(9 * SIZE)
    prefixes.keep(prefix("a"))
    prefixes.drop(lambda name: name == "b")
    assert len(prefixes) == 1
    prefixes.drop(lambda name: name == "a")
    assert prefixes.take("a", [(b"0",)], text=True, audio=True) is None


def test_contents_are_looked_at_no_further_than_needed():
    prefixes = Prefixes(9 * SIZE)
    prefixes.keep(prefix("a", 2))
    looked = []

    def contents():
        for content in (b"0", b"1", b"2"):
            looked.append(content)
            yield (content,)

    found = prefixes.take("a", contents(), text=True, audio=True)
    assert found is not None
    assert found[1] == 2
    assert looked == [b"0", b"1"]


def test_a_place_of_features_is_a_part_of_the_contents():
    one, two = (random_row(9, seed=1, segments=((begin, 4),), surplus=0) for begin in (2, 3))
    two = dataclasses.replace(two, audio_ids=one.audio_ids, text_ids=one.text_ids, features=one.features)
    assert content_of(one) != content_of(two)
    assert content_of(one) == content_of(dataclasses.replace(one))
    assert content_of(one) != content_of(dataclasses.replace(one, features=None, segments=()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_any_type_are_told_apart(dtype):
    one = random_row(9, seed=1, segments=((2, 4),), surplus=0)
    half = dataclasses.replace(one, features=[frames.to(dtype) for frames in one.features])
    assert content_of(half) != content_of(one)
    assert content_of(half) == content_of(dataclasses.replace(half))
