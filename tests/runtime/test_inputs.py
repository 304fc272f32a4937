"""Sound in its order and numbers, features in and out of blobs."""

import pytest

from kimia.errors import NotFoundError, TurnCancelledError, UnavailableError
from kimia.runtime.fake import FakeTokenizer
from kimia.runtime.inputs import (
    FeatureOutlet,
    clip_contents,
    follow,
    known_beginning,
    read_encoded,
    read_sound,
    replay,
    sounds_to_encode,
)
from kimia.v1.conversation_pb2 import Message, Spoken
from kimia.v1.turn_pb2 import Chunk, Encoded, InputAudio
from tests.runtime.workers import FORMAT, heard, input_log, new_turn, sound

pytestmark = pytest.mark.unit

PLACE = ("{0}", "t", "weights")


class Journal:
    def __init__(self, **logs):
        self.logs = logs
        self.reads = []

    async def read(self, turn_id, log, start=0):
        self.reads.append((turn_id, log))
        return self.logs.get(turn_id, [])


class Feed:
    """One log that ends as it does."""

    turn_id = "s.t"

    def __init__(self, chunks):
        self.log = chunks

    async def chunks(self, log):
        for chunk in self.log:
            yield chunk


class Blobs:
    def __init__(self, down=False):
        self.kept = {}
        self.down = down
        self.batches = []
        self.puts = []

    async def put_all(self, blobs):
        self.puts.append(len(blobs))
        if self.down:
            raise UnavailableError("down")
        self.kept.update(blobs)

    async def get(self, keys):
        if self.down:
            raise UnavailableError("down")
        self.batches.append(len(keys))
        return [self.kept.get(key) for key in keys]


def spoken(number, **clip):
    message = Message(spoken=Spoken())
    message.spoken.clip.number = number
    for name, value in clip.items():
        if name == "codes":
            message.spoken.clip.codes.extend(value)
        else:
            message.spoken.clip.format.CopyFrom(value)
    return message


def test_known_clips_are_encoded_only_after_a_rewind_and_first():
    turn = new_turn(heard(4), heard(1, feature_keys=["k"]), spoken(2, format=FORMAT), spoken(3, codes=[1]))
    assert [s.clip.number for s in sounds_to_encode(turn, rewound=False)] == [4, 2]
    assert [s.clip.number for s in sounds_to_encode(turn, rewound=True)] == [1, 4, 2]


async def test_sound_comes_from_the_logs_it_lies_in_under_the_numbers_of_this_turn():
    turn = new_turn(heard(0, source_turn="s.old", source_number=5), heard(7), heard(2))
    own = input_log((2, b"two"), (9, b"dropped"), (7, b"seven"), size=3)
    journal = Journal(**{"s.old": input_log((5, b"five"), (6, b"six"), size=2), turn.id: own})
    pieces = await read_sound(journal, turn, sounds_to_encode(turn, rewound=False))
    assert [(p.index, p.input.clip, p.input.data, p.input.clip_end, p.final) for p in pieces] == [
        (0, 0, b"fi", False, False),
        (1, 0, b"ve", True, False),
        (2, 7, b"sev", False, False),
        (3, 7, b"en", True, False),
        (4, 2, b"two", True, True),
    ]
    assert sorted(journal.reads) == sorted([("s.old", "input"), (turn.id, "input")])


@pytest.mark.parametrize("log", [[], [Chunk(input=InputAudio(data=b"begun"))]], ids=["nothing", "not all"])
async def test_sound_that_is_not_there_is_named(log):
    turn = new_turn(heard(0))
    with pytest.raises(NotFoundError, match=r"messages\[0\].*send it again"):
        await read_sound(Journal(**{turn.id: log}), turn, sounds_to_encode(turn, rewound=False))


async def test_a_log_that_stops_before_its_end_is_told():
    chunks = [Chunk(index=0), Chunk(index=1, final=True)]
    assert [c async for c in follow(Feed(chunks), "tokens")] == chunks
    with pytest.raises(TurnCancelledError):
        [c async for c in follow(Feed(chunks[:1]), "tokens")]


# ---- features ---------------------------------------------------------------------------------------------------


async def encoded_by(turn, log):
    return [chunk async for chunk in FakeTokenizer().run(turn, replay(log))]


async def put_away(turn, log, blobs, published=(), made=None):
    outlet = FeatureOutlet(blobs, turn, PLACE, clip_contents(turn, log), published)
    made = made if made is not None else await encoded_by(turn, log)
    return [out for chunk in made for out in await outlet.take(chunk)]


async def found(turn, log, blobs):
    return await known_beginning(blobs, sounds_to_encode(turn, False), PLACE, clip_contents(turn, log))


async def test_features_go_away_and_come_back():
    turn, blobs = new_turn(heard(0), heard(1)), Blobs()
    log = input_log((0, sound(30)), (1, sound(5)))
    out = await put_away(turn, log, blobs)
    assert [c.encoded.feature_key.split(":")[-1] for c in out] == ["0", "1", "2", "0"]
    assert not any(c.encoded.features for c in out)
    assert len(blobs.kept) == 4
    assert await read_encoded(Feed(out), blobs, turn) == await encoded_by(turn, log)


async def test_equal_sound_has_equal_keys_and_other_sound_or_format_has_not():
    blobs = Blobs()
    turn = new_turn(heard(0), heard(1), heard(2))
    turn.messages[2].audio.format.sample_rate = 8000
    log = input_log((0, sound(3)), (1, sound(3)), (2, sound(3)))
    keys = [c.encoded.feature_key for c in await put_away(turn, log, blobs)]
    assert keys[0] == keys[1] != keys[2]
    other = await put_away(new_turn(heard(0)), input_log((0, sound(3, salt=2))), blobs)
    assert other[0].encoded.feature_key not in keys


async def test_an_interrupted_run_goes_on_with_the_same_keys():
    turn, blobs = new_turn(heard(0)), Blobs()
    log = input_log((0, sound(30)))
    first = await put_away(turn, log, blobs)
    rest = [chunk async for chunk in FakeTokenizer().run(turn, replay(log), first[:1])]
    assert await put_away(turn, log, blobs, first[:1], rest) == first[1:]


async def test_a_segment_goes_away_and_is_published_in_one_go():
    turn, blobs = new_turn(heard(0)), Blobs()
    log = input_log((0, sound(800)), size=100_000)
    made = await encoded_by(turn, log)
    outlet = FeatureOutlet(blobs, turn, PLACE, clip_contents(turn, log))
    given = [len(await outlet.take(chunk)) for chunk in made]
    assert [count for count in given if count] == [32, 32, 5]
    assert [sum(given[: at + 1]) for at in (31, 63, 68)] == [32, 64, 69]
    assert blobs.puts == [32, 32, 5]


@pytest.mark.parametrize("codes", [5, 375, 376, 381, 382, 800])
async def test_what_was_encoded_once_is_found_whoever_asks(codes):
    """375 codes are a segment; one can be encoded early when 6.25 codes have come behind it."""
    blobs, log = Blobs(), input_log((0, sound(codes)), (1, sound(20, 2)), size=100_000)
    first = await put_away(new_turn(heard(0), heard(1)), log, blobs)
    turn = new_turn(heard(0), heard(1))
    again = await found(turn, log, blobs)
    assert again[-1].report.units == 2
    for chunks in (first, again):
        chunks[-1].report.compute_seconds = 0
    assert again == first
    assert await read_encoded(Feed(again), blobs, turn) == await encoded_by(turn, log)


async def test_a_clip_that_goes_on_shares_its_finished_segments():
    blobs = Blobs()
    data = sound(1000)
    turn = new_turn(heard(0))
    await put_away(turn, input_log((0, data[: 382 * 2560]), size=50_000), blobs)
    log = input_log((0, data), size=50_000)
    known = await found(turn, log, blobs)
    assert len(known) == 32
    assert sum(len(chunk.encoded.codes) for chunk in known) == 375
    assert not known[-1].final
    made = [chunk async for chunk in FakeTokenizer().run(turn, replay(log), known)]
    assert [*known, *await put_away(turn, log, blobs, known, made)] == await put_away(turn, log, Blobs())
    assert await found(turn, input_log((0, data[: 381 * 2560]), size=50_000), blobs) == []  # it has another end


async def test_only_a_beginning_without_gaps_is_known():
    blobs, turn = Blobs(), new_turn(heard(0), heard(1), heard(2))
    logs = input_log((0, sound(30)), (1, sound(30, 2)), (2, sound(30, 3)))
    out = await put_away(turn, logs, blobs)
    del blobs.kept[out[4].encoded.feature_key]  # in the middle of the second clip
    known = await found(turn, logs, blobs)
    assert [(chunk.index, chunk.encoded.clip) for chunk in known] == [(0, 0), (1, 0), (2, 0)]
    assert known == out[:3]


async def test_nothing_is_known_of_others_and_of_what_has_no_blobs():
    blobs, log = Blobs(), input_log((0, sound(20)))
    await put_away(new_turn(heard(0)), log, blobs)
    spoken_turn, turn = new_turn(spoken(0, format=FORMAT)), new_turn(heard(0))
    assert await found(spoken_turn, log, blobs) == []
    for place in (("{0}", "other", "weights"), ("{0}", "t", "others")):
        sounds, names = sounds_to_encode(turn, False), clip_contents(turn, log)
        assert await known_beginning(blobs, sounds, place, names) == []
    blobs.down = True
    assert await found(turn, log, blobs) == []


async def test_without_features_there_is_no_blob():
    turn, blobs = new_turn(spoken(0, format=FORMAT)), Blobs()
    out = await put_away(turn, input_log((0, sound(3))), blobs)
    assert out[0].encoded.feature_key == ""
    assert blobs.kept == {}


async def test_what_cannot_be_put_away_stays_inline():
    turn = new_turn(heard(0))
    out = await put_away(turn, input_log((0, sound(3))), Blobs(down=True))
    assert out[0].encoded.features
    assert out[0].encoded.feature_key == ""
    assert await read_encoded(Feed(out), Blobs(), turn) == out


async def test_a_rewind_restores_history_under_its_keys_and_publishes_only_the_rest():
    blobs = Blobs()
    turn = new_turn(heard(3, feature_keys=["x", "y"]), heard(5))
    log = input_log((3, sound(20)), (5, sound(14)))
    out = await put_away(turn, log, blobs)
    assert [(c.index, c.encoded.clip, c.final) for c in out] == [(0, 5, False), (1, 5, True)]
    assert {"x", "y"} < set(blobs.kept)
    assert out[-1].HasField("report")
    read = await read_encoded(Feed(out), blobs, turn)
    assert [(c.index, c.encoded.clip, len(c.encoded.codes), c.final) for c in read] == [
        (0, 3, 12, False),
        (1, 3, 8, False),
        (2, 5, 12, False),
        (3, 5, 2, True),
    ]
    assert all(c.encoded.features for c in read)


async def test_a_rewind_of_history_alone_ends_with_an_empty_chunk():
    turn, blobs = new_turn(heard(3, feature_keys=["x"])), Blobs()
    out = await put_away(turn, input_log((3, sound(3))), blobs)
    assert [(c.index, c.final, c.HasField("encoded")) for c in out] == [(0, True, False)]
    assert set(blobs.kept) == {"x"}


async def test_features_that_are_gone_are_noticed():
    turn, blobs = new_turn(heard(0)), Blobs()
    out = await put_away(turn, input_log((0, sound(30))), blobs)
    del blobs.kept[out[1].encoded.feature_key]
    assert await read_encoded(Feed(out), blobs, turn) is None


async def test_many_blobs_are_fetched_in_batches():
    turn, blobs = new_turn(heard(0, feature_keys=[f"k{i}" for i in range(130)])), Blobs()
    for i in range(130):
        blobs.kept[f"k{i}"] = Encoded(codes=[i], features=b"f", clip_end=i == 129).SerializeToString()
    read = await read_encoded(Feed([]), blobs, turn)
    assert [c.encoded.codes[0] for c in read] == list(range(130))
    assert blobs.batches == [64, 64, 2]


async def test_nothing_is_read_for_a_turn_without_sound():
    assert await read_encoded(Feed([]), Blobs(), new_turn()) == []
