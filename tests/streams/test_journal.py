"""Turns, logs and sessions in the journal."""

import asyncio

import pytest

from kimia.errors import NotFoundError, RequestError, StateError, TurnCancelledError
from kimia.streams import keys
from kimia.streams.jobs import Outcome
from kimia.streams.journal import Journal, Playback, next_stage, session_keys, turn_keys
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.conversation_pb2 import Message
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import Failure
from tests.streams.turns import DETOKENIZER, LLM, SPEECH, TOKENIZER, World, encoded, new_turn, sound, speech, step

pytestmark = pytest.mark.unit

FAILURE = Failure(code=13, reason="BROKEN", message="it broke")


# ---- opening ------------------------------------------------------------------------------------------------------


async def test_a_new_turn_is_open_and_belongs_to_its_reader(world):
    turn = new_turn()
    opened = await world.journal.open_turn(turn, "o1")
    head = await world.journal.head(turn.id)
    assert (opened.turn_id, opened.existing) == (turn.id, False)
    assert (head.state, head.reader, head.turn, head.failure) == ("open", "o1", turn, None)
    assert head.opened > 0 == head.submitted == head.ended
    assert head.stages == {}
    assert set(head.next.values()) == {0}


async def test_opening_twice_finds_the_turn(world):
    turn = new_turn()
    first = await world.journal.open_turn(turn, "o1")
    again = await world.journal.open_turn(turn, "o1")
    other = await world.journal.open_turn(turn, "o2")
    assert (again.existing, again.token) == (True, first.token)
    assert (other.existing, other.token) == (True, 0)
    assert (await world.journal.head(turn.id)).reader == "o1"


async def test_an_idempotency_key_finds_the_turn_that_it_began(world):
    one, two = (new_turn(idempotency_key="k") for _ in range(2))
    first = await world.journal.open_turn(one, "o1")
    again = await world.journal.open_turn(two, "o1")
    assert (again.turn_id, again.token, again.existing) == (one.id, first.token, True)
    with pytest.raises(NotFoundError):
        await world.journal.head(two.id)


async def test_an_idempotency_key_is_of_one_tenant(world):
    one, two = (new_turn(idempotency_key="k") for _ in range(2))
    two.caller.tenant = "other"
    await world.journal.open_turn(one, "o1")
    assert not (await world.journal.open_turn(two, "o1")).existing


async def test_an_idempotency_key_of_a_forgotten_turn_begins_a_new_one(world):
    one, two = (new_turn(idempotency_key="k") for _ in range(2))
    await world.journal.open_turn(one, "o1")
    await world.redis.delete(keys.head("{0}", one.id))
    again = await world.journal.open_turn(two, "o1")
    assert (again.turn_id, again.existing) == (two.id, False)


async def test_many_who_open_at_once_get_one_turn(world):
    turns = [new_turn(idempotency_key="k") for _ in range(20)]
    opened = await asyncio.gather(*(world.journal.open_turn(turn, f"o{i}") for i, turn in enumerate(turns)))
    assert len({found.turn_id for found in opened}) == 1
    assert [found.existing for found in opened].count(False) == 1


async def test_a_head_that_is_made_again_goes_on_with_its_logs(world):
    turn = new_turn()
    opened = await world.journal.open_turn(turn, "o1")
    await world.journal.append_input(turn.id, opened.token, [sound(0), sound(1)])
    await world.redis.delete(keys.head("{0}", turn.id))
    again = await world.journal.open_turn(turn, "o1")
    assert await world.journal.append_input(turn.id, again.token, [sound(2)]) == 3


# ---- input --------------------------------------------------------------------------------------------------------


async def test_input_is_read_from_any_index(world):
    turn = new_turn()
    opened = await world.journal.open_turn(turn, "o1")
    assert await world.journal.append_input(turn.id, opened.token, [sound(0), sound(1), sound(2, final=True)]) == 3
    assert await world.journal.read(turn.id, "input") == [sound(0), sound(1), sound(2, final=True)]
    assert await world.journal.read(turn.id, "input", 2) == [sound(2, final=True)]
    assert await world.journal.read(turn.id, "input", 3) == []
    entries = await world.redis.xrange(keys.log("{0}", turn.id, "input"))
    assert [name for name, _ in entries] == [b"1-0", b"2-0", b"3-0"]


async def test_input_that_is_sent_again_changes_nothing(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.append_input(turn.id, token, [sound(0), sound(1)])
    other = sound(1)
    other.input.data = b"something else"
    assert await world.journal.append_input(turn.id, token, [other, sound(2)]) == 3
    assert await world.journal.append_input(turn.id, token, [sound(0)]) == 3
    assert await world.journal.append_input(turn.id, token, []) == 3
    assert await world.journal.read(turn.id, "input") == [sound(0), sound(1), sound(2)]


async def test_input_with_a_gap_is_refused(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    with pytest.raises(StateError, match="send again from 0"):
        await world.journal.append_input(turn.id, token, [sound(1)])
    with pytest.raises(RequestError):
        await world.journal.append_input(turn.id, token, [sound(0), sound(2)])
    assert await world.journal.read(turn.id, "input") == []


async def test_who_takes_the_reader_over_shuts_the_old_one_out(world):
    turn = new_turn()
    old = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.append_input(turn.id, old, [sound(0)])
    new = await world.journal.take_reader(turn.id, "o2")
    for write in (world.journal.append_input(turn.id, old, [sound(1)]), world.journal.submit(turn, old)):
        with pytest.raises(StateError, match="another connection"):
            await write
    assert await world.journal.append_input(turn.id, new, [sound(1)]) == 2
    assert (await world.journal.head(turn.id)).reader == "o2"


async def test_an_old_reader_is_shut_out_even_where_a_fail_over_lost_the_counter(world):
    turn = new_turn()
    old = (await world.journal.open_turn(turn, "o1")).token
    await world.redis.delete(keys.token("{0}", "reader"))
    new = await world.journal.take_reader(turn.id, "o2")
    await world.redis.delete(keys.token("{0}", "reader"))
    assert len({old, new, (await world.journal.open_turn(new_turn(), "o1")).token}) == 3
    with pytest.raises(StateError, match="another connection"):
        await world.journal.submit(turn, old)


async def test_a_new_reader_gets_the_pointers(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.publish(claim, step(0))
    await world.journal.take_reader(claim.turn.id, "o2")
    await worker.publish(claim, step(1))
    assert await world.pointers("orchestrator") == [(claim.turn.id, "tokens", 1)]
    assert await world.pointers("o2") == [(claim.turn.id, "tokens", 2)]


async def test_input_points_to_the_worker_that_reads_it(world):
    worker = await world.worker(TOKENIZER)
    turn = new_turn(route=SPEECH)
    token = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.submit(turn, token)
    await worker.sweep(1)
    await world.journal.append_input(turn.id, token, [sound(0)])
    assert await world.pointers("w1") == [(turn.id, "input", 1)]


async def test_an_ended_turn_takes_no_input(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.cancel(turn.id)
    for write in (world.journal.append_input(turn.id, token, [sound(0)]), world.journal.submit(turn, token)):
        with pytest.raises(TurnCancelledError):
            await write


async def test_a_failed_turn_takes_no_input(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.fail(turn.id, FAILURE)
    with pytest.raises(StateError, match="has ended"):
        await world.journal.append_input(turn.id, token, [sound(0)])


# ---- submitting ---------------------------------------------------------------------------------------------------


async def test_a_submitted_turn_has_its_final_spec_and_one_job(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    turn.messages.add(role=1).text.text = "hello"
    await world.journal.submit(turn, token)
    await world.journal.submit(turn, token)  # once more: nothing
    head = await world.journal.head(turn.id)
    assert (head.state, head.turn) == ("running", turn)
    assert head.opened <= head.submitted <= head.stages["llm"].queued
    assert await world.redis.xlen(keys.jobs("{0}", "llm", "interactive")) == 1


async def test_a_turn_without_route_is_refused(world):
    turn = new_turn(route=())
    token = (await world.journal.open_turn(turn, "o1")).token
    with pytest.raises(RequestError, match="route"):
        await world.journal.submit(turn, token)


async def test_a_turn_is_not_forgotten_while_it_may_wait(world):
    turn = new_turn()
    turn.deadline.GetCurrentTime()
    turn.deadline.seconds += 10_000
    await world.submitted(turn)
    assert await world.redis.ttl(keys.head("{0}", turn.id)) > 10_000


async def test_jobs_name_tenant_and_key(world):
    turn = await world.submitted()
    [(_, fields)] = await world.redis.xrange(keys.jobs("{0}", "llm", "interactive"))
    assert fields == {b"t": turn.id.encode(), b"o": b"acme", b"k": b"k1"}


def test_the_next_stage_follows_the_order_of_the_pipeline():
    assert [next_stage(new_turn(route=SPEECH), kind) for kind in (TOKENIZER, LLM, DETOKENIZER)] == [*SPEECH[1:], ""]
    assert next_stage(new_turn(route=["llm"]), LLM) == ""
    assert next_stage(new_turn(route=["llm", "detokenizer"]), TOKENIZER) == "llm"  # rewound


# ---- ending -------------------------------------------------------------------------------------------------------


async def test_only_the_first_terminal_state_counts(world):
    turn = await world.submitted()
    assert await world.journal.fail(turn.id, FAILURE)
    assert not await world.journal.cancel(turn.id)
    assert not await world.journal.fail(turn.id, Failure(reason="OTHER"))
    head = await world.journal.head(turn.id)
    assert (head.state, head.failure, head.over) == ("error", FAILURE, True)
    assert head.ended >= head.submitted
    assert (await world.pointers("orchestrator")) == [(turn.id, "state", 0)]


async def test_many_who_end_a_turn_at_once_end_it_once(world):
    turn = await world.submitted()
    ended = await asyncio.gather(*(world.journal.cancel(turn.id) for _ in range(20)))
    assert ended.count(True) == 1


async def test_what_is_not_there_is_not_found(world):
    turn = new_turn()
    for call in (
        world.journal.head(turn.id),
        world.journal.take_reader(turn.id, "o1"),
        world.journal.append_input(turn.id, 1, [sound(0)]),
        world.journal.submit(turn, 1),
        world.journal.load_session("nobody"),
        world.journal.delete_session("nobody"),
        world.journal.save_session(SessionRecord(id="nobody"), 3),
    ):
        with pytest.raises(NotFoundError):
            await call
    assert not await world.journal.cancel(turn.id)
    assert not await world.journal.fail(turn.id, FAILURE)
    assert await world.journal.read(turn.id, "audio") == []
    assert await world.names() <= {keys.token("{0}", "reader")}  # nothing came into being


@pytest.mark.parametrize("bad", ["", "abc", "{0}.x", "a.b.c"])
async def test_ids_of_another_form_are_refused(valkey_url, bad):
    wire = await Wire.connect(valkey_url)
    with pytest.raises(RequestError):
        await Journal(wire).head(bad)
    await wire.aclose()


# ---- sessions -----------------------------------------------------------------------------------------------------


def conversation(*turns: str, blobs: tuple[str, ...] = ()) -> SessionRecord:
    record = SessionRecord(id="s1", turn_ids=turns)
    message = Message(role=1)
    message.audio.feature_keys.extend(blobs)
    record.messages.append(message)
    return record


async def test_a_session_comes_back_as_it_was_saved(world):
    record = conversation("s1.a", blobs=("b1",))
    assert await world.journal.save_session(record, 0) == 1
    assert await world.journal.load_session("s1") == (record, 1)
    record.heard_ms = 5
    assert await world.journal.save_session(record, 1) == 2
    assert await world.journal.load_session("s1") == (record, 2)


@pytest.mark.parametrize("stale", [0, 1, 3])
async def test_who_has_not_read_the_latest_version_may_not_write(world, stale):
    await world.journal.save_session(conversation(), 0)
    record = conversation("s1.a")
    await world.journal.save_session(record, 1)
    with pytest.raises(StateError, match="changed"):
        await world.journal.save_session(SessionRecord(id="s1", heard_ms=9), stale)
    assert await world.journal.load_session("s1") == (record, 2)


async def test_saving_the_same_again_is_no_conflict(world):
    """A connection that breaks after the call and before the answer."""
    assert await world.journal.save_session(conversation(), 0) == 1
    assert await world.journal.save_session(conversation(), 0) == 1
    assert (await world.journal.load_session("s1"))[1] == 1


async def test_saving_lets_session_and_input_live(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.append_input(turn.id, token, [sound(0)])
    version = await world.journal.save_session(conversation(turn.id), 0)
    names = [*session_keys("{0}", "s1")[:2], keys.log("{0}", turn.id, "input")]
    for name in names:
        await world.redis.expire(name, 5)
    await world.journal.save_session(conversation(turn.id), version)
    assert all([await world.redis.ttl(name) > 3000 for name in names])
    assert await world.redis.ttl(keys.head("{0}", turn.id)) < 1000


async def test_input_of_an_older_turn_lives_as_long_as_a_message_names_it(world):
    turn = new_turn()
    token = (await world.journal.open_turn(turn, "o1")).token
    await world.journal.append_input(turn.id, token, [sound(0)])
    record = conversation()
    record.messages[0].audio.source_turn = turn.id
    await world.journal.save_session(record, 0)
    assert await world.redis.ttl(keys.log("{0}", turn.id, "input")) > 3000


# ---- deletion -----------------------------------------------------------------------------------------------------


async def test_deletion_is_final(world):
    jobs, claims = await world.speaking(new_turn(route=SPEECH, idempotency_key="k"))
    turn = claims["llm"].turn
    await world.journal.save_session(conversation(turn.id, blobs=("{0}:blob:acme:m:00:0",)), 0)
    token = await world.journal.take_reader(turn.id, "o1")
    await world.journal.append_input(turn.id, token, [sound(0)])
    await world.redis.set("{0}:blob:acme:m:00:0", b"features", ex=100)

    await world.journal.delete_session("s1")

    late = await jobs["llm"].publish(claims["llm"], step(1))
    assert late.outcome is Outcome.GONE
    assert (await jobs["detokenizer"].publish(claims["detokenizer"], speech(1, final=True))).outcome is Outcome.GONE
    assert await jobs["tokenizer"].heartbeat([claims["tokenizer"]]) == [claims["tokenizer"]]
    await jobs["llm"].release(claims["llm"])
    await jobs["llm"].rewind(claims["llm"])
    await jobs["llm"].fail(claims["llm"], FAILURE)
    assert not await world.journal.cancel(turn.id)
    for call in (
        world.journal.append_input(turn.id, token, [sound(1)]),
        world.journal.submit(turn, token),
        world.journal.take_reader(turn.id, "o1"),
        world.journal.open_turn(new_turn(), "o1"),
        world.journal.save_session(conversation(turn.id), 0),
        world.journal.save_session(conversation(turn.id), 1),
        world.journal.delete_session("s1"),
    ):
        with pytest.raises(NotFoundError):
            await call
    left = {name for name in await world.names() if "s1" in name or ":blob:" in name or ":idem:" in name}
    assert left == {keys.gone("{0}", "s1")}
    assert [await worker.depth() for worker in jobs.values()] == [(0, 0)] * 3


async def test_a_session_forgets_turns_of_which_nothing_is_left(world):
    """Its set of turns does not grow with a call that has no end; what a deletion must find stays in it."""
    members = keys.session_turns("{0}", "s1")
    kept, sounding = new_turn(), new_turn()
    await world.journal.open_turn(kept, "o1")
    token = (await world.journal.open_turn(sounding, "o1")).token
    await world.journal.append_input(sounding.id, token, [sound(0)])
    await world.redis.unlink(keys.head("{0}", sounding.id))  # its sound is remembered for longer
    most = 0
    for _ in range(300):
        turn = new_turn()
        await world.journal.open_turn(turn, "o1")
        most = max(most, await world.redis.scard(members))
        await world.redis.unlink(keys.head("{0}", turn.id))
    assert most <= 64
    await world.journal.delete_session("s1")
    assert {name for name in await world.names() if "s1" in name} == {keys.gone("{0}", "s1")}


async def test_a_session_forgets_no_turn_that_lives(world):
    turns = [new_turn() for _ in range(130)]
    for turn in turns:
        await world.journal.open_turn(turn, "o1")
    assert await world.redis.scard(keys.session_turns("{0}", "s1")) == len(turns)
    await world.journal.delete_session("s1")
    assert {name for name in await world.names() if "s1" in name} == {keys.gone("{0}", "s1")}


async def test_deletion_tells_reader_and_workers(world):
    _jobs, claims = await world.speaking()
    await world.journal.delete_session("s1")
    for owner in ("orchestrator", "llm-1", "detokenizer-1"):
        assert (await world.pointers(owner))[-1] == (claims["llm"].turn.id, "state", 0)
    assert (claims["llm"].turn.id, "gone", 0) in await world.pointers("llm-1")


async def test_a_queued_turn_that_was_deleted_is_dropped(world):
    worker = await world.worker()
    await world.submitted()
    await world.journal.delete_session("s1")
    assert await worker.sweep(1) == []
    assert await worker.depth() == (0, 0)


async def test_deletion_leaves_other_sessions_alone(world):
    worker = await world.worker()
    kept = await world.claimed(worker, new_turn("s2"))
    await world.submitted(new_turn("s1"))
    await world.journal.delete_session("s1")
    assert (await worker.publish(kept, step(0))).outcome is Outcome.WRITTEN


async def test_deletion_takes_the_blobs_that_a_turn_has_used(world):
    worker = await world.worker(TOKENIZER)
    claim = await world.claimed(worker, new_turn(route=SPEECH))
    await world.redis.set("{0}:blob:a", b"features", ex=100)
    await worker.publish(claim, encoded(0, key="{0}:blob:a"))
    assert keys.session_blobs("{0}", "s1") in await world.names() - await world.permanent()
    await world.journal.delete_session("s1")
    assert not await world.redis.exists("{0}:blob:a")


async def test_blobs_are_deleted_where_they_lie(valkey_url):
    wire = await Wire.connect(valkey_url, valkey_url.removesuffix("/0") + "/1")
    await wire.blobs.set("b1", b"features", ex=100)
    await Journal(wire).save_session(conversation(blobs=("b1",)), 0)
    await Journal(wire).delete_session("s1")
    assert not await wire.blobs.exists("b1")
    await wire.aclose()


# ---- expiry, partitions -------------------------------------------------------------------------------------------


async def test_everything_expires_but_jobs_and_counters(world):
    jobs, claims = await world.speaking(new_turn(route=SPEECH, idempotency_key="k"))
    turn = claims["llm"].turn
    token = await world.journal.take_reader(turn.id, "o1")
    await world.journal.append_input(turn.id, token, [sound(0)])
    await world.journal.save_session(conversation(turn.id, blobs=("b1",)), 0)
    await jobs["llm"].release(claims["llm"])
    await jobs["llm"].sweep(1)
    await world.journal.cancel(turn.id)
    await world.submitted(new_turn("s2"), worker="llm-1")
    await world.submitted(new_turn("s3"))
    await world.journal.delete_session("s3")
    stages = ("tokenizer", "llm", "detokenizer")
    allowed = {keys.jobs("{0}", stage, name) for stage in stages for name in keys.CLASSES}
    allowed |= {keys.token("{0}", name) for name in (*stages, "reader")}
    assert await world.permanent() <= allowed
    assert len(await world.names()) > len(allowed) + 10


async def test_publishing_renews_all_keys_of_a_turn(world):
    jobs, claims = await world.speaking()
    turn = claims["llm"].turn
    names = [name for name in turn_keys("{0}", turn.id) if await world.redis.exists(name)]
    assert len(names) == 5  # all but the input
    for name in names:
        await world.redis.expire(name, 5)
    await jobs["llm"].publish(claims["llm"], step(1))
    assert all([await world.redis.ttl(name) > 800 for name in names])


async def test_publishing_shortens_no_life(world):
    jobs, claims = await world.speaking()
    name = keys.log("{0}", claims["llm"].turn.id, "tokens")
    await world.redis.expire(name, 5000)
    await jobs["llm"].publish(claims["llm"], step(1))
    assert await world.redis.ttl(name) > 4000


async def test_sessions_spread_over_partitions(valkey_url):
    world = World(await Wire.connect(valkey_url, options=WireOptions(partitions=4)))
    worker = await world.worker()
    turns = [await world.submitted(new_turn(f"session-{number}")) for number in range(12)]
    claims = await worker.sweep(12)
    assert {claim.turn.id for claim in claims} == {turn.id for turn in turns}
    assert len({claim.job_key for claim in claims}) == 4
    for claim in claims:
        assert await worker.publish_all([(claim, step(0)), (claim, step(1, final=True))])
        assert await world.state(claim.turn) == "done"
        await world.journal.delete_session(claim.turn.session_id)
    assert await worker.depth() == (0, 0)
    assert not [name for name in await world.names() if ":turn:" in name]
    await world.wire.aclose()


# ---- playback -----------------------------------------------------------------------------------------------------


async def heard(world, turn):
    """(seconds heard, seconds since then, rounded to what a test takes at most)."""
    found = await world.journal.playback(turn.id)
    return found and (found.heard, round(found.age, -1))


async def test_the_furthest_position_counts_whoever_says_it(world):
    turn = await world.submitted()
    assert await heard(world, turn) is None
    for said, known in (((1.5, 0.0), (1.5, 0)), ((2.25, 40.0), (2.25, 40)), ((2.0, 0.0), (2.25, 40))):
        await world.journal.note_playback(turn.id, Playback(*said))
        assert await heard(world, turn) == known


async def test_of_a_player_that_stands_still_the_latest_word_counts(world):
    turn = await world.submitted()
    for age, known in ((60.0, 60), (30.0, 30), (90.0, 30)):
        await world.journal.note_playback(turn.id, Playback(3.0, age))
        assert await heard(world, turn) == (3.0, known)


async def test_a_position_is_pointed_to_the_workers_that_pace_themselves_by_it(world):
    jobs, claims = await world.speaking()
    turn = claims["llm"].turn
    before = {name: len(await world.pointers(f"{name}-1")) for name in jobs}
    for said in (1.0, 1.0, 0.5):
        await world.journal.note_playback(turn.id, Playback(said, 10.0))
    new = {name: (await world.pointers(f"{name}-1"))[count:] for name, count in before.items()}
    told = new["llm"]
    assert {log for _, log, _ in told} == {"playback"}
    assert new == {"tokenizer": [], "llm": told, "detokenizer": told}


async def test_only_a_turn_that_runs_has_a_position(world):
    turn = new_turn()
    await world.journal.note_playback(turn.id, Playback(1.0, 0.0))
    assert await world.names() == set()
    opened = await world.journal.open_turn(turn, "o1")
    await world.journal.note_playback(turn.id, Playback(1.0, 0.0))
    await world.journal.submit(turn, opened.token)
    assert await heard(world, turn) is None
    await world.journal.note_playback(turn.id, Playback(1.0, 0.0))
    await world.journal.cancel(turn.id)
    before = await world.redis.hgetall(keys.head("{0}", turn.id))
    await world.journal.note_playback(turn.id, Playback(2.0, 0.0))
    assert await heard(world, turn) is None
    assert await world.redis.hgetall(keys.head("{0}", turn.id)) == before


async def test_positions_beyond_reason_are_kept_exact(world):
    turn = await world.submitted()
    await world.journal.note_playback(turn.id, Playback(2.0**64, 0.0))
    assert await heard(world, turn) == (86400.0, 0)
