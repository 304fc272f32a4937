"""Taking, holding, publishing and handing over, with workers that pause, die and come back."""

import asyncio
import time
from dataclasses import replace
from itertools import cycle, pairwise

import pytest

from kimia.streams import keys
from kimia.streams.jobs import Jobs, Outcome, Published
from kimia.streams.journal import Playback
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, Failure
from tests.streams.turns import (
    DETOKENIZER,
    LLM,
    SPEECH,
    TOKENIZER,
    TRACE,
    World,
    encoded,
    new_turn,
    sound,
    speech,
    step,
)

pytestmark = pytest.mark.unit

WRITTEN, DUPLICATE, GAP = Outcome.WRITTEN, Outcome.DUPLICATE, Outcome.GAP
FENCED, CANCELLED = Outcome.FENCED, Outcome.CANCELLED


def late_turn(**fields):
    turn = new_turn(**fields)
    turn.deadline.seconds = 1
    return turn


# ---- the life of a turn -------------------------------------------------------------------------------------------


async def test_a_turn_passes_three_stages(world):
    tokenizer, llm, detokenizer = [await world.worker(kind, kind.name) for kind in (TOKENIZER, LLM, DETOKENIZER)]
    turn = new_turn(route=SPEECH)
    token = (await world.journal.open_turn(turn, "orchestrator")).token
    await world.journal.append_input(turn.id, token, [sound(0, final=True)])
    await world.journal.submit(turn, token)

    [first] = await tokenizer.sweep(5)
    assert (first.turn, first.kind, first.attempt, first.next_index, first.rewound) == (turn, TOKENIZER, 1, 0, False)
    assert first.queued_seconds > 0
    assert await tokenizer.publish(first, encoded(0)) == Published(WRITTEN, 1)
    assert await llm.sweep(5) == []  # an open segment cannot be prefilled
    assert await tokenizer.publish(first, encoded(1, final=True)) == Published(WRITTEN, 2)

    [second] = await llm.sweep(5)
    assert await detokenizer.sweep(5) == []
    await llm.publish(second, step(0))
    [third] = await detokenizer.sweep(5)  # while the llm goes on
    await llm.publish(second, step(1, final=True))
    assert await world.state(turn) == "running"
    await detokenizer.publish_all([(third, speech(0)), (third, speech(1, final=True))])

    head = await world.journal.head(turn.id)
    assert (head.state, dict(head.next)) == ("done", {"input": 1, "encoded": 2, "tokens": 2, "audio": 2})
    assert [times.consumer for times in head.stages.values()] == list(SPEECH)
    for times in head.stages.values():
        assert head.submitted <= times.queued <= times.claimed <= times.first <= times.done <= head.ended
    assert await world.journal.read(turn.id, "audio") == [speech(0), speech(1, final=True)]
    assert [await jobs.depth() for jobs in (tokenizer, llm, detokenizer)] == [(0, 0)] * 3
    assert await tokenizer.sweep(1) == await llm.sweep(1) == await detokenizer.sweep(1) == []


async def test_pointers_reach_the_reader_and_the_next_worker(world):
    _, claims = await world.speaking()
    turn = claims["llm"].turn.id
    assert await world.pointers("orchestrator") == [(turn, "tokens", 1), (turn, "audio", 1)]
    assert await world.pointers("detokenizer-1") == []  # it read the first step when it began
    llm = await world.worker(LLM, "llm-1")
    await llm.publish(claims["llm"], step(1))
    assert await world.pointers("detokenizer-1") == [(turn, "tokens", 2)]
    await world.journal.cancel(turn)
    for owner in ("orchestrator", "tokenizer-1", "llm-1", "detokenizer-1"):
        assert (await world.pointers(owner))[-1] == (turn, "state", 0)


async def test_a_text_turn_ends_with_the_llm(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    assert await worker.publish(claim, step(0, final=True)) == Published(WRITTEN, 1)
    assert await world.state(claim.turn) == "done"
    assert await world.pointers("orchestrator") == [(claim.turn.id, "tokens", 1), (claim.turn.id, "state", 0)]


# ---- publishing ---------------------------------------------------------------------------------------------------


async def test_what_was_published_never_changes(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.publish(claim, step(0, text="a"))
    assert await worker.publish(claim, step(0, text="b")) == Published(DUPLICATE, 1)
    assert await world.journal.read(claim.turn.id, "tokens") == [step(0, text="a")]


async def test_a_gap_says_where_to_go_on(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.publish(claim, step(0))
    assert await worker.publish(claim, step(2)) == Published(GAP, 1)
    assert await world.journal.read(claim.turn.id, "tokens") == [step(0)]
    outcomes = await worker.publish_all([(claim, step(index)) for index in (1, 2, 3)])
    assert outcomes == [Published(WRITTEN, index) for index in (2, 3, 4)]


async def test_a_last_chunk_may_be_sent_again(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.publish(claim, step(0, final=True))
    assert await worker.publish(claim, step(0, final=True)) == Published(DUPLICATE, 1)
    assert await worker.publish(claim, step(1)) == Published(CANCELLED, 1)
    assert await world.state(claim.turn) == "done"


async def test_a_turn_is_done_when_all_its_logs_are_whole(world):
    """A fail-over took the end of the ids back after the detokenizer had read it."""
    jobs, claims = await world.speaking()
    await jobs["detokenizer"].publish(claims["detokenizer"], speech(1, final=True))
    assert await world.state(claims["llm"].turn) == "running"
    await jobs["llm"].publish(claims["llm"], step(1, final=True))
    assert await world.state(claims["llm"].turn) == "done"
    assert (await world.pointers("orchestrator"))[-1] == (claims["llm"].turn.id, "state", 0)


async def test_many_turns_are_published_in_one_round_trip(world):
    worker = await world.worker()
    for number in range(3):
        await world.submitted(new_turn(f"s{number}"))
    claims = await worker.sweep(3)
    await world.redis.script_flush()  # as after a restart of the server
    outcomes = await worker.publish_all([(claim, step(index)) for index in range(4) for claim in claims])
    assert [published.next for published in outcomes] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert {published.outcome for published in outcomes} == {WRITTEN}


# ---- fencing and take-over ----------------------------------------------------------------------------------------


async def test_a_worker_that_wakes_up_late_writes_nothing(world):
    paused, other = await world.worker(LLM, "paused"), await world.worker(LLM, "other")
    old = await world.claimed(paused)
    await paused.publish(old, step(0, text="old"))
    new = await world.taken_over(old, other)
    assert (new.next_index, new.attempt) == (1, 1)

    assert await paused.publish(old, step(1, text="old")) == Published(FENCED, 1)
    assert await paused.publish(old, step(0, text="old")) == Published(FENCED, 1)
    await paused.fail(old, Failure(reason="BROKEN"))
    await paused.release(old)
    await paused.rewind(old)
    assert await world.state(old.turn) == "running"
    assert await world.holder(new) == "other"

    assert await other.publish(new, step(1, final=True)) == Published(WRITTEN, 2)
    assert [chunk.step.text for chunk in await world.journal.read(old.turn.id, "tokens")] == ["old", ""]
    assert (await world.journal.head(old.turn.id)).stages["llm"].take_overs == 1


async def test_the_heartbeat_of_a_zombie_does_not_take_the_turn_back(world):
    zombie, other = await world.worker(LLM, "zombie"), await world.worker(LLM, "other")
    old = await world.claimed(zombie)
    new = await world.taken_over(old, other)
    assert await zombie.heartbeat([old]) == [old]
    assert await world.holder(new) == "other"
    assert await other.heartbeat([new]) == []
    assert await other.publish(new, step(0)) == Published(WRITTEN, 1)


async def test_a_restarted_worker_has_another_name(world):
    first = await world.worker(LLM, "host-1")
    old = await world.claimed(first)
    second = await world.worker(LLM, "host-2")
    new = await world.taken_over(old, second)
    assert await first.publish(old, step(0)) == Published(FENCED, 0)
    assert await second.publish(new, step(0)) == Published(WRITTEN, 1)


async def test_a_worker_that_recovers_its_own_turn_fences_its_old_claim(world):
    worker = await world.worker()
    old = await world.claimed(worker)
    new = await world.taken_over(old, worker)
    assert new.token > old.token
    assert await worker.heartbeat([old, new]) == [old]
    assert await worker.publish(old, step(0)) == Published(FENCED, 0)
    assert await worker.publish(new, step(0)) == Published(WRITTEN, 1)


async def test_no_token_is_given_twice_even_where_a_fail_over_lost_the_counter(world):
    worker = await world.worker()
    old = await world.claimed(worker)
    await world.redis.delete(keys.token("{0}", "llm"))
    new = await world.taken_over(old, worker)
    assert new.token > old.token
    assert await worker.heartbeat([old, new]) == [old]
    assert await worker.publish(old, step(0)) == Published(FENCED, 0)
    assert await worker.publish(new, step(0)) == Published(WRITTEN, 1)


async def test_the_name_fences_too(world):
    old_worker, new_worker = await world.worker(LLM, "old"), await world.worker(LLM, "new")
    old = await world.claimed(old_worker)
    new = await world.taken_over(old, new_worker)
    old = replace(old, token=new.token)  # the clock of another server may stand still, or go back
    assert await old_worker.publish(old, step(0)) == Published(FENCED, 0)
    assert await old_worker.heartbeat([old]) == [old]
    assert await new_worker.publish(new, step(0)) == Published(WRITTEN, 1)


async def test_a_held_turn_is_not_recovered(world):
    worker, other = await world.worker(LLM, "w1"), await world.worker(LLM, "w2")
    claim = await world.claimed(worker)
    assert await other.recover(1) == []
    assert await other.sweep(1) == []
    assert await worker.heartbeat([claim]) == []


async def test_heartbeats_keep_a_turn(world):
    worker, other = await world.worker(LLM, "w1"), await world.worker(LLM, "w2")
    claim = await world.claimed(worker)
    await world.silence(claim)
    assert await worker.heartbeat([claim]) == []  # just in time
    assert await other.recover(1) == []
    assert await world.holder(claim) == "w1"
    await world.redis.xclaim(claim.job_key, keys.GROUP, "w1", 0, [claim.job_id], idle=3_600_000)
    assert await other.recover(1) == []  # the lease in the head was renewed as well


async def test_the_head_is_asked_even_where_the_entry_looks_abandoned(world):
    """The entry's age and the lease are renewed together, but only the lease decides."""
    worker, other = await world.worker(LLM, "w1"), await world.worker(LLM, "w2")
    claim = await world.claimed(worker)
    await world.redis.xclaim(claim.job_key, keys.GROUP, "w1", 0, [claim.job_id], idle=3_600_000)
    assert await other.recover(1) == []
    assert await world.holder(claim) == "w1"


async def test_leases_end_by_themselves(journal_url):
    world = World(await Wire.connect(journal_url, options=WireOptions(lease=0.02)))
    dead, other = await world.worker(LLM, "dead"), await world.worker(LLM, "other")
    old = await world.claimed(dead)
    while not (found := await other.recover(1)):
        pass
    assert found[0].turn == old.turn
    assert await dead.publish(old, step(0)) == Published(FENCED, 0)
    await world.wire.aclose()


async def test_a_claim_needs_its_entry(world):
    """Between delivery and claim the entry may have gone to another worker."""
    slow, quick = await world.worker(LLM, "slow"), await world.worker(LLM, "quick")
    await world.submitted()
    call_many = world.wire.call_many

    async def overtaken(script, calls):
        [(names, args)] = calls
        await world.redis.xclaim(names[6], keys.GROUP, "quick", 0, [args[2]])
        return await call_many(script, calls)

    world.wire.call_many = overtaken
    assert await slow.sweep(1) == []
    world.wire.call_many = call_many
    assert await quick.sweep(1) == []  # it is delivered already: recovery's affair
    assert (await quick.depth()) == (0, 1)


async def test_a_living_owner_keeps_a_turn_that_was_delivered_elsewhere(world):
    """XAUTOCLAIM moved the entry, then the owner's heartbeat came first: the head decides."""
    worker = await world.worker(LLM, "w1")
    claim = await world.claimed(worker)
    await world.redis.xclaim(claim.job_key, keys.GROUP, "w2", 0, [claim.job_id])
    assert await worker.heartbeat([claim]) == []
    assert await world.holder(claim) == "w1"


async def test_two_workers_never_get_the_same_turn(world):
    workers = [await world.worker(LLM, f"w{number}") for number in range(4)]
    turns = [await world.submitted(new_turn(f"s{number}"), worker="w0") for number in range(20)]
    found = await asyncio.gather(*(w.sweep(3) for w in workers * 5), *(w.recover(3) for w in workers))
    claimed = [claim.turn.id for claims in found for claim in claims]
    assert sorted(claimed) == sorted(turn.id for turn in turns)


async def test_two_workers_never_recover_the_same_turn(world):
    dead = await world.worker(LLM, "dead")
    turns = [await world.submitted(new_turn(f"s{number}")) for number in range(10)]
    await world.silence(*await dead.sweep(10))
    workers = [await world.worker(LLM, f"w{number}") for number in range(4)]
    found = await asyncio.gather(*(worker.recover(3) for worker in workers * 3))
    assert sorted(c.turn.id for claims in found for c in claims) == sorted(turn.id for turn in turns)


async def test_recovery_takes_no_more_than_wanted(world):
    dead, other = await world.worker(LLM, "dead"), await world.worker(LLM, "other")
    for number in range(5):
        await world.submitted(new_turn(f"s{number}"))
    await world.silence(*await dead.sweep(5))
    assert [len(await other.recover(2)) for _ in range(4)] == [2, 2, 1, 0]


async def test_a_claim_says_how_far_the_caller_has_heard(world):
    jobs, other = await world.worker(), await world.worker(name="w2")
    claim = await world.claimed(jobs)
    assert claim.playback is None
    await world.journal.note_playback(claim.turn.id, Playback(2.5, 30.0))
    found = (await world.taken_over(claim, other)).playback
    assert (found.heard, round(found.age, -1)) == (2.5, 30.0)


# ---- poison -------------------------------------------------------------------------------------------------------


async def test_a_turn_that_kills_every_worker_is_given_up(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    for attempt in (2, 3):
        claim = await world.taken_over(claim, worker)
        assert claim.attempt == attempt
    await world.silence(claim)
    assert await worker.recover(1) == []
    head = await world.journal.head(claim.turn.id)
    assert (head.state, head.failure.reason, head.failure.code) == ("error", "GAVE_UP", 13)
    assert "3 attempts" in head.failure.message
    assert await world.pointers("orchestrator") == [(claim.turn.id, "state", 0)]
    [(_, letter)] = await world.redis.xrange(keys.dlq("{0}", "llm"))
    assert (letter[b"t"], letter[b"reason"], letter[b"tries"]) == (claim.turn.id.encode(), b"GAVE_UP", b"3")
    assert letter[b"trace"] == TRACE.encode()
    assert keys.dlq("{0}", "llm") not in await world.permanent()
    assert await worker.depth() == (0, 0)
    assert await worker.publish(claim, step(0)) == Published(CANCELLED, 0)


async def test_progress_resets_the_count(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    for index in range(6):
        assert (await worker.publish(claim, step(index))).outcome is WRITTEN
        claim = await world.taken_over(claim, worker)
        assert claim.attempt == 1


async def test_a_chunk_that_was_there_is_no_progress(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.publish(claim, step(0))
    for attempt in (1, 2, 3):
        claim = await world.taken_over(claim, worker)
        assert claim.attempt == attempt
        assert (await worker.publish(claim, step(0))).outcome is DUPLICATE
    await world.silence(claim)
    assert await worker.recover(1) == []
    assert (await world.journal.head(claim.turn.id)).failure.reason == "GAVE_UP"


async def test_handing_over_does_not_count(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    for _ in range(5):
        await worker.release(claim)
        assert await worker.publish(claim, step(0)) == Published(FENCED, 0)
        [claim] = await worker.sweep(1)
        assert claim.attempt == 1
    assert (await world.journal.head(claim.turn.id)).stages["llm"].take_overs == 5


# ---- handing over -------------------------------------------------------------------------------------------------


async def test_a_turn_that_was_handed_over_goes_on_where_it_was(world):
    old, new = await world.worker(LLM, "old"), await world.worker(LLM, "new")
    claim = await world.claimed(old)
    await old.publish(claim, step(0))
    queued = (await world.journal.head(claim.turn.id)).stages["llm"].queued
    await old.release(claim)
    await old.release(claim)  # once more: nothing
    assert (await world.journal.head(claim.turn.id)).stages["llm"].queued == queued  # its wait was over long ago
    assert await old.depth() == (1, 0)
    [taken] = await new.sweep(5)
    assert (taken.turn, taken.next_index, taken.queued_seconds) == (claim.turn, 1, 0)
    assert await new.publish(taken, step(1, final=True)) == Published(WRITTEN, 2)
    assert await new.depth() == (0, 0)


async def test_a_turn_that_ended_is_not_handed_over(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await world.journal.cancel(claim.turn.id)
    await worker.release(claim)
    assert await worker.depth() == (0, 0)


async def test_a_worker_fails_a_turn(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.fail(claim, Failure(code=3, reason="CONTEXT_LENGTH", message="too long"))
    head = await world.journal.head(claim.turn.id)
    assert (head.state, head.failure.reason) == ("error", "CONTEXT_LENGTH")
    assert await worker.depth() == (0, 0)
    assert await worker.publish(claim, step(0)) == Published(CANCELLED, 0)


async def test_a_closed_worker_is_forgotten(world):
    worker, other = await world.worker(LLM, "w1"), await world.worker(LLM, "w2")
    await worker.sweep(1)
    await worker.aclose()
    stream = keys.jobs("{0}", "llm", "interactive")
    assert [c["name"] for c in await world.redis.xinfo_consumers(stream, keys.GROUP)] == []
    assert not await world.redis.exists(keys.worker_jobs("{0}", "llm", "w1"))
    claim = await world.claimed(other)
    await other.aclose()  # it holds something: its name stays, so that others can recover it
    assert await world.holder(claim) == "w2"


# ---- cancelling, deadlines ----------------------------------------------------------------------------------------


async def test_cancelled_before_it_is_claimed(world):
    worker = await world.worker()
    turn = await world.submitted()
    assert await world.journal.cancel(turn.id)
    assert await worker.sweep(1) == []
    assert await worker.depth() == (0, 0)


async def test_cancelled_while_it_runs(world):
    jobs, claims = await world.speaking()
    turn = claims["llm"].turn
    assert await world.journal.cancel(turn.id)
    assert await jobs["llm"].publish(claims["llm"], step(1)) == Published(CANCELLED, 1)
    assert await jobs["detokenizer"].heartbeat([claims["detokenizer"]]) == [claims["detokenizer"]]
    assert [await worker.depth() for worker in jobs.values()] == [(0, 0)] * 3
    assert await world.journal.read(turn.id, "tokens") == [step(0)]
    assert await world.state(turn) == "cancelled"


async def test_cancelled_after_it_was_done(world):
    worker = await world.worker()
    claim = await world.claimed(worker)
    await worker.publish(claim, step(0, final=True))
    assert not await world.journal.cancel(claim.turn.id)
    assert await world.state(claim.turn) == "done"


async def test_cancelled_when_its_worker_is_dead(world):
    dead, other = await world.worker(LLM, "dead"), await world.worker(LLM, "other")
    claim = await world.claimed(dead)
    await world.journal.cancel(claim.turn.id)
    await world.silence(claim)
    assert await other.recover(1) == []
    assert await other.depth() == (0, 0)


async def test_expired_work_is_dropped_and_the_reader_told(world):
    worker = await world.worker()
    turn = await world.submitted(late_turn())
    assert await worker.sweep(1) == []
    head = await world.journal.head(turn.id)
    assert (head.state, head.failure.reason, head.failure.code) == ("error", "DEADLINE_EXCEEDED", 4)
    assert await world.pointers("orchestrator") == [(turn.id, "state", 0)]
    assert await worker.depth() == (0, 0)


async def test_a_turn_that_has_begun_is_not_dropped_when_it_changes_hands(world):
    worker = await world.worker()
    turn = new_turn()
    turn.deadline.GetCurrentTime()
    turn.deadline.seconds += 1000
    claim = await world.claimed(worker, turn)
    await worker.publish(claim, step(0))
    await world.redis.hset(keys.head("{0}", turn.id), "deadline", 1)
    again = await world.taken_over(claim, worker)
    assert again.next_index == 1


@pytest.mark.parametrize("hours", [-2, 2])
async def test_a_deadline_is_of_the_journal_s_clock_whatever_the_orchestrator_s_says(world, monkeypatch, hours):
    worker = await world.worker()
    now, skewed = time.time_ns(), time.time_ns() + hours * 3600 * 10**9
    monkeypatch.setattr("kimia.streams.journal.time.time_ns", lambda: skewed)
    turn = new_turn()
    turn.deadline.FromNanoseconds(skewed + 60 * 10**9)
    claim = await world.claimed(worker, turn)
    deadline = int(await world.redis.hget(keys.head("{0}", claim.turn.id), "deadline"))
    assert 59 < deadline / 1e6 - now / 1e9 < 120


async def test_a_dropped_turn_does_not_hide_the_next(world):
    worker = await world.worker()
    for number in range(3):
        await world.submitted(late_turn(session=f"late{number}"))
    good = await world.submitted(new_turn("good"))
    assert [claim.turn for claim in await worker.sweep(1)] == [good]


# ---- features that are gone ---------------------------------------------------------------------------------------


async def test_a_rewound_turn_is_encoded_again(world):
    tokenizer, llm = await world.worker(TOKENIZER, "t1"), await world.worker(LLM, "l1")
    first = await world.claimed(tokenizer, new_turn(route=SPEECH))
    await tokenizer.publish_all([(first, encoded(0)), (first, encoded(1, final=True))])
    [old] = await llm.sweep(1)
    await llm.rewind(old)
    await llm.rewind(old)  # once more: nothing
    assert await llm.publish(old, step(0)) == Published(FENCED, 0)
    assert await llm.heartbeat([old]) == [old]
    assert await llm.sweep(1) == await llm.recover(1) == []
    assert await llm.depth() == (0, 0)

    [again] = await tokenizer.sweep(1)
    assert (again.rewound, again.next_index, again.turn) == (True, 2, first.turn)
    assert await tokenizer.publish(first, encoded(0)) == Published(FENCED, 2)
    assert await tokenizer.publish(again, encoded(0)) == Published(DUPLICATE, 2)
    assert await llm.sweep(1) == []
    for _ in range(2):
        assert await tokenizer.publish(again, encoded(1, final=True)) == Published(DUPLICATE, 2)
    [new] = await llm.sweep(2)
    assert (new.rewound, new.attempt) == (True, 2)
    assert await llm.publish(new, step(0)) == Published(WRITTEN, 1)
    assert await tokenizer.depth() == (0, 0)


async def test_what_is_done_is_not_rewound(world):
    llm = await world.worker(LLM, "llm-1")
    claim = await world.claimed(llm, new_turn(route=("llm", "detokenizer")))
    await llm.publish(claim, step(0, final=True))
    await llm.rewind(claim)
    assert "tokenizer" not in (await world.journal.head(claim.turn.id)).stages


async def test_a_turn_without_new_sound_can_be_rewound(world):
    tokenizer, llm = await world.worker(TOKENIZER, "t1"), await world.worker(LLM, "l1")
    await llm.rewind(await world.claimed(llm))
    [claim] = await tokenizer.sweep(1)
    await tokenizer.publish(claim, encoded(0, final=True))
    [again] = await llm.sweep(1)
    assert again.rewound
    await llm.publish(again, step(0, final=True))
    assert await world.state(claim.turn) == "done"


async def test_features_that_vanish_again_and_again_end_the_turn(world):
    tokenizer, llm = await world.worker(TOKENIZER, "t1"), await world.worker(LLM, "l1")
    claims = [await world.claimed(llm)]
    rounds = 0
    while claims:
        rounds += 1
        await llm.rewind(claims[0])
        [encoding] = await tokenizer.sweep(1)
        await tokenizer.publish(encoding, encoded(0, final=True))
        claims = await llm.sweep(1)
    assert rounds == 3
    assert (await world.journal.head(encoding.turn.id)).failure.reason == "GAVE_UP"


# ---- copies for one worker ----------------------------------------------------------------------------------------


async def test_a_worker_that_is_wanted_gets_the_turn_once(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    turn = await world.submitted(worker="wanted")
    [claim] = await wanted.sweep(1)
    assert (claim.turn, claim.job_key) == (turn, keys.jobs("{0}", "llm", "interactive"))
    copies = await world.redis.xpending(keys.worker_jobs("{0}", "llm", "wanted"), keys.GROUP)
    assert copies["pending"] == 0
    assert await other.sweep(5) == await wanted.sweep(5) == []
    assert await world.holder(claim) == "wanted"  # the class entry was handed to the owner
    await wanted.publish(claim, step(0, final=True))
    assert await world.redis.xlen(keys.worker_jobs("{0}", "llm", "wanted")) <= 1
    assert await wanted.depth() == (0, 0)


async def test_the_recovery_record_outlives_the_wanted_worker(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    turn = await world.submitted(worker="wanted")
    [claim] = await wanted.sweep(1)
    assert await other.sweep(1) == []  # handed to the owner, which dies
    taken = await world.taken_over(claim, other)
    assert taken.turn == turn
    assert await wanted.publish(claim, step(0)) == Published(FENCED, 0)
    assert await other.publish(taken, step(0, final=True)) == Published(WRITTEN, 1)


async def test_an_entry_that_is_handed_to_its_owner_is_as_old_as_its_silence(world):
    """Else the turn of an owner that died meanwhile would wait for another lease."""
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    turn = await world.submitted(worker="wanted")
    [claim] = await wanted.sweep(1)
    seconds, _ = await world.redis.time()
    heard = seconds - 500  # of a lease of 600 seconds
    await world.redis.hset(keys.head("{0}", turn.id), "llm:lease", (heard + 600) * 1_000_000)
    assert await other.sweep(1) == []
    [entry] = await world.redis.xpending_range(claim.job_key, keys.GROUP, "-", "+", 1)
    assert entry["consumer"] == b"wanted"
    assert entry["time_since_delivered"] >= 500_000


async def test_whoever_gets_the_class_entry_of_a_dead_owner_takes_over(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    turn = await world.submitted(worker="wanted")
    [claim] = await wanted.sweep(1)
    await world.end_lease(turn, "llm")  # before anybody got the class entry
    [taken] = await other.sweep(1)
    assert await wanted.heartbeat([claim]) == [claim]
    assert await other.publish(taken, step(0)) == Published(WRITTEN, 1)


async def test_a_copy_that_comes_late_is_dropped(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    await world.submitted(worker="wanted")
    [claim] = await other.sweep(1)
    assert await wanted.sweep(5) == []
    assert await wanted.heartbeat([]) == []
    assert await world.holder(claim) == "other"
    assert await other.publish(claim, step(0)) == Published(WRITTEN, 1)


async def test_a_copy_that_comes_after_the_owner_has_died_takes_over(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    await world.submitted(worker="wanted")
    [claim] = await other.sweep(1)
    await world.silence(claim)
    [taken] = await wanted.sweep(1)
    assert taken.token > claim.token
    assert await world.holder(taken) == "wanted"
    assert await other.publish(claim, step(0)) == Published(FENCED, 0)


async def test_an_entry_of_a_finished_turn_is_dropped(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    turn = await world.submitted(new_turn(route=("llm", "detokenizer")), worker="wanted")
    [claim] = await wanted.sweep(1)
    await wanted.publish(claim, step(0, final=True))  # the class entry was never delivered
    assert await world.state(turn) == "running"
    assert await other.sweep(5) == []
    assert await other.depth() == (0, 0)


async def test_an_entry_that_was_replaced_is_dropped(world):
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    await world.submitted(worker="wanted")
    [claim] = await wanted.sweep(1)
    await wanted.release(claim)  # the class entry was never delivered
    [taken] = await other.sweep(5)
    assert await other.depth() == (0, 1)
    assert (await other.publish(taken, step(0, final=True))).outcome is WRITTEN
    assert await other.depth() == (0, 0)


async def test_the_wanted_worker_may_be_the_second_stage(world):
    tokenizer, wanted = await world.worker(TOKENIZER, "t1"), await world.worker(LLM, "wanted")
    turn = new_turn(route=SPEECH)
    await world.submitted(turn, worker="wanted")
    [claim] = await tokenizer.sweep(1)
    await tokenizer.publish(claim, encoded(0, final=True))
    assert await world.redis.xlen(keys.worker_jobs("{0}", "llm", "wanted")) == 1
    assert [c.turn for c in await wanted.sweep(1)] == [turn]


async def test_a_worker_that_sweeps_keeps_its_own_stream(world):
    worker = await world.worker()
    own = keys.worker_jobs("{0}", "llm", "w1")
    await world.redis.expire(own, 5)
    await worker.sweep(1)
    assert await world.redis.ttl(own) > 800
    await world.redis.delete(own)
    await worker.sweep(1)
    assert await world.redis.ttl(own) > 800


async def test_a_worker_that_is_not_there_gets_no_copy(world):
    worker = await world.worker()
    turn = await world.submitted(worker="nobody")
    assert not await world.redis.exists(keys.worker_jobs("{0}", "llm", "nobody"))
    assert [claim.turn for claim in await worker.sweep(1)] == [turn]


# ---- sweeping and waiting -----------------------------------------------------------------------------------------


async def test_turns_come_in_the_order_of_their_class(world):
    worker = await world.worker(LLM, "w1")
    handed = await world.claimed(worker, new_turn("handed"))
    batch = await world.submitted(new_turn("batch", job_class=JOB_CLASS_BATCH))
    first, second = await world.submitted(new_turn("first")), await world.submitted(new_turn("second"))
    await worker.release(handed)
    assert [claim.turn for claim in await worker.sweep(2)] == [handed.turn, first]
    assert [claim.turn for claim in await worker.sweep(1)] == [second]
    assert [claim.turn for claim in await worker.sweep(5)] == [batch]


async def test_a_sweep_takes_no_more_than_wanted(world):
    worker = await world.worker()
    for number in range(3):
        await world.submitted(new_turn(f"a{number}"))
        await world.submitted(new_turn(f"b{number}", job_class=JOB_CLASS_BATCH))
    assert len(await worker.sweep(2)) == 2
    assert await worker.depth() == (4, 2)
    assert await worker.sweep(0) == []
    assert len(await worker.sweep(10)) == 4


async def test_interactive_turns_of_all_partitions_come_before_batch(valkey_url):
    world = World(await Wire.connect(valkey_url, options=WireOptions(partitions=3, lease=600)))
    worker = await world.worker()
    for number in range(6):
        await world.submitted(new_turn(f"b{number}", job_class=JOB_CLASS_BATCH))
        await world.submitted(new_turn(f"a{number}"))
    found = [claim.turn.session_id for _ in range(12) for claim in await worker.sweep(1)]
    assert sorted(found[:6]) == [f"a{number}" for number in range(6)]
    assert sorted(found[6:]) == [f"b{number}" for number in range(6)]
    await world.wire.aclose()


SHARE = 8  # claims of which one may be of a batch turn that has waited for too long


async def rush(url, interactive, batch, **options):
    """A worker before turns of both classes, the batch turns having come first."""
    world = World(await Wire.connect(url, options=WireOptions(lease=600, **options)))
    for number in range(batch):
        await world.submitted(new_turn(f"b{number}", job_class=JOB_CLASS_BATCH))
    for number in range(interactive):
        await world.submitted(new_turn(f"a{number}"))
    return world, await world.worker()


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("counts", [[1], [3], [5, 1, 2], [SHARE], [20]], ids=str)
async def test_batch_turns_that_waited_for_too_long_get_their_share_and_no_more(journal_url, counts, partitions):
    world, worker = await rush(journal_url, interactive=60, batch=20, batch_patience=0, partitions=partitions)
    found = []
    for count in cycle(counts):
        claims = await worker.sweep(count)
        assert len(claims) == count  # nobody's share is left unused
        found += [claim.turn.session_id for claim in claims]
        if len(found) >= 5 * SHARE:
            break
    places = [place for place, session in enumerate(found) if session.startswith("b")]
    steps = [after - before for before, after in pairwise([-1, *places])]
    assert SHARE <= min(steps) <= max(steps) < SHARE + max(counts)
    for p in range(partitions):  # each class of each partition in its order
        for name in "ab":
            own = [int(s[1:]) for s in found if s[0] == name and keys.partition_of(s, partitions) == f"{{{p}}}"]
            assert own == sorted(own)
    await world.wire.aclose()


async def test_batch_turns_wait_while_they_are_new(journal_url):
    world, worker = await rush(journal_url, interactive=3 * SHARE, batch=1)
    found = [claim.turn.session_id for _ in range(3 * SHARE + 1) for claim in await worker.sweep(1)]
    assert found[-1] == "b0"
    await world.wire.aclose()


async def test_what_was_handed_over_comes_before_a_batch_turn_that_has_waited(journal_url):
    world, worker = await rush(journal_url, interactive=2 * SHARE, batch=1, batch_patience=0)
    claims = await worker.sweep(SHARE - 1)
    await worker.release(claims[0])
    found = [claim.turn.session_id for _ in range(3) for claim in await worker.sweep(1)]
    assert found == [claims[0].turn.session_id, "b0", f"a{SHARE - 1}"]
    await world.wire.aclose()


@pytest.mark.parametrize("job_class", [0, JOB_CLASS_BATCH])
async def test_a_waiting_worker_is_woken_by_a_job(world, job_class):
    worker = await world.worker()
    await world.claimed(worker)
    assert await worker.sweep(1) == []
    waiting = asyncio.create_task(worker.wait(60))
    turn = await world.submitted(new_turn("new", job_class=job_class))
    await asyncio.wait_for(waiting, 30)
    assert [claim.turn for claim in await worker.sweep(1)] == [turn]


async def test_a_job_between_sweep_and_wait_is_not_missed(world):
    worker = await world.worker()
    assert await worker.sweep(1) == []
    await world.submitted()
    await asyncio.wait_for(worker.wait(60), 30)


async def test_what_a_sweep_left_wakes_at_once(world):
    worker = await world.worker()
    for number in range(2):
        await world.submitted(new_turn(f"s{number}"))
    await worker.sweep(1)
    await asyncio.wait_for(worker.wait(60), 30)


async def test_waiting_ends_without_a_job(world):
    worker = await world.worker()
    await worker.wait(0.001)
    await worker.sweep(1)
    await worker.wait(0.001)
    assert await worker.sweep(1) == []


async def test_a_job_may_come_before_the_first_worker(world):
    turn = await world.submitted()
    worker = await world.worker()
    assert await worker.depth() == (1, 0)
    assert [claim.turn for claim in await worker.sweep(1)] == [turn]


async def test_groups_come_back_after_they_were_lost(world):
    worker = await world.worker()
    await world.redis.flushall()
    assert await worker.recover(1) == []
    await world.redis.flushall()
    turn = await world.submitted()
    assert await worker.depth() == (0, 0)
    assert [claim.turn for claim in await worker.sweep(1)] == [turn]


# ---- trimming -----------------------------------------------------------------------------------------------------


async def test_done_jobs_are_trimmed_and_others_kept(world):
    worker = await world.worker()
    stream = keys.jobs("{0}", "llm", "interactive")
    for number in range(5):
        await world.submitted(new_turn(f"s{number}"))
    claims = await worker.sweep(3)
    assert await world.redis.xlen(stream) == 5
    await worker.publish(claims[1], step(0, final=True))
    assert await world.redis.xlen(stream) == 5  # the oldest is pending
    await worker.publish(claims[0], step(0, final=True))
    assert await world.redis.xlen(stream) == 3
    await worker.publish(claims[2], step(0, final=True))
    assert await world.redis.xlen(stream) == 3  # two not delivered, and the last that was
    assert await worker.depth() == (2, 0)
    for claim in await worker.sweep(2):
        await worker.publish(claim, step(0, final=True))
    assert await world.redis.xlen(stream) == 1
    assert await worker.depth() == (0, 0)
    assert (await world.redis.xinfo_groups(stream))[0]["lag"] == 0


async def test_long_dead_consumers_are_forgotten(world, monkeypatch):
    stream = keys.jobs("{0}", "llm", "interactive")
    dead, holding = await world.worker(LLM, "dead"), await world.worker(LLM, "holding")
    await world.claimed(holding)
    await world.redis.xgroup_createconsumer(stream, keys.GROUP, "dead")
    monkeypatch.setattr("kimia.streams.jobs._FORGOTTEN", -1)
    await world.worker(LLM, "new")
    assert [c["name"] for c in await world.redis.xinfo_consumers(stream, keys.GROUP)] == [b"holding"]
    assert await dead.sweep(1) == []  # it was not dead: it comes back by itself


# ---- a turn that is left to the worker that it would like ---------------------------------------------------------


@pytest.fixture
async def leaving(journal_url):
    """Workers that leave turns to others for as long as a test takes."""
    wire = await Wire.connect(journal_url, options=WireOptions(lease=600, prefix_patience=600))
    yield World(wire)
    await wire.aclose()


async def two(world) -> tuple[Jobs, Jobs]:
    """A worker that has looked for jobs and has rows left, and another one."""
    wanted, other = await world.worker(LLM, "wanted"), await world.worker(LLM, "other")
    assert await wanted.sweep(1) == []
    return wanted, other


async def test_a_turn_is_left_to_the_free_worker_that_it_would_like(leaving):
    wanted, other = await two(leaving)
    turn = await leaving.submitted(worker="wanted")
    assert await other.sweep(1) == []
    [job] = other.postponed()
    assert other.postponed() == []
    assert 500 < job.seconds <= 600
    [claim] = await wanted.sweep(1)
    assert claim.turn == turn
    assert await leaving.holder(claim) == "wanted"
    assert await other.claim_again(job, patient=True) == ([], None)
    assert await leaving.holder(claim) == "wanted"
    assert await wanted.publish(claim, step(0, final=True)) == Published(WRITTEN, 1)
    assert await other.depth() == (0, 0)


async def test_it_is_not_left_for_longer(leaving):
    _, other = await two(leaving)
    turn = await leaving.submitted(worker="wanted")
    await other.sweep(1)
    [job] = other.postponed()
    assert (await other.claim_again(job, patient=True))[1].seconds < job.seconds
    [claim], none = await other.claim_again(job, patient=False)
    assert none is None
    assert claim.turn == turn
    assert claim.attempt == 1


async def test_one_that_has_waited_is_taken(leaving):
    _, other = await two(leaving)
    turn = await leaving.submitted(worker="wanted")
    await leaving.redis.hset(keys.head("{0}", turn.id), "llm:queued", 1)
    assert [claim.turn for claim in await other.sweep(1)] == [turn]


@pytest.mark.parametrize("what", ["busy", "silent", "left", "never there"])
async def test_nobody_waits_for_a_worker_that_will_not_come(leaving, what):
    wanted, other = await two(leaving)
    if what == "busy":
        await leaving.submitted(new_turn("before"))
        assert len(await wanted.sweep(1)) == 1
    elif what == "silent":
        free = keys.worker_jobs("{0}", "llm", "wanted") + ":free"
        assert 0 < await leaving.redis.pttl(free) <= 3 * 600_000
        await leaving.redis.delete(free)
    elif what == "left":
        await wanted.aclose()
    turn = await leaving.submitted(worker="wanted" if what != "never there" else "nobody")
    assert [claim.turn for claim in await other.sweep(1)] == [turn]
    assert other.postponed() == []


async def test_the_wanted_worker_itself_and_whoever_takes_over_do_not_wait(leaving):
    wanted, other = await two(leaving)
    await leaving.submitted(worker="wanted")
    await leaving.redis.delete(keys.worker_jobs("{0}", "llm", "wanted"))  # its copy is lost
    [claim] = await wanted.sweep(1)
    await wanted.sweep(1)
    taken = await leaving.taken_over(claim, other)
    await other.release(taken)
    await wanted.sweep(0)
    assert [again.turn for again in await other.sweep(1)] == [claim.turn]


async def test_a_worker_that_dies_while_it_leaves_a_turn_to_another_loses_nothing(leaving):
    _, other = await two(leaving)
    turn = await leaving.submitted(worker="wanted")
    await other.sweep(1)
    [job] = other.postponed()
    await leaving.redis.xclaim(job.job_key, keys.GROUP, "other", 0, [job.job_id], idle=3_600_000, justid=True)
    await leaving.redis.delete(
        keys.worker_jobs("{0}", "llm", "wanted"), keys.worker_jobs("{0}", "llm", "wanted") + ":free"
    )
    third = await leaving.worker(LLM, "third")
    assert [claim.turn for claim in await third.recover(1)] == [turn]
    assert await other.claim_again(job, patient=True) == ([], None)


async def test_a_copy_that_was_taken_for_the_last_row_is_about_to_be_claimed(leaving):
    """Between its two calls the wanted worker has no row left, and is the one to wait for all the same."""
    wanted, other = await two(leaving)
    turn = await leaving.submitted(worker="wanted")
    call_many = leaving.wire.call_many

    async def overtaken(script, calls):
        leaving.wire.call_many = call_many
        assert await other.sweep(1) == []
        assert [job.turn_id for job in other.postponed()] == [turn.id]
        return await call_many(script, calls)

    leaving.wire.call_many = overtaken
    assert [claim.turn for claim in await wanted.sweep(1)] == [turn]
