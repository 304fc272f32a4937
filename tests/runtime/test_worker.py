"""Workers on a real journal: nothing is lost, repeated or left hanging, whatever happens to a worker."""

import asyncio
import time
from itertools import pairwise

import pytest
from prometheus_client import REGISTRY

from kimia.errors import AudioError, UnavailableError
from kimia.model.schedule import LOW_LATENCY
from kimia.runtime.attempt import Attempt
from kimia.runtime.fake import DELAY, FakeDetokenizer, FakeLanguageModel, FakeTiming, FakeTokenizer, build
from kimia.runtime.pacing import sound_seconds
from kimia.runtime.rows import Rows
from kimia.runtime.worker import Worker
from kimia.stage import CODE_SECONDS, LLM
from kimia.streams import keys
from kimia.streams.journal import Playback
from kimia.streams.ledger import Ledger
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.conversation_pb2 import Message, Spoken
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, Chunk
from tests.client.proxy import Proxy
from tests.runtime.workers import (
    ROUTE,
    SECONDS,
    House,
    computed,
    content,
    eventually,
    heard,
    input_log,
    new_turn,
    sound,
)

pytestmark = pytest.mark.unit

QUICK = FakeTiming(steps=60)
STEADY = FakeTiming(steps=60, step_seconds=0.002, realtime_factor=0.005)
LEASE = 0.5


@pytest.fixture
async def wire(valkey_url):
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=LEASE))
    yield wire
    await wire.aclose()


@pytest.fixture
async def house(wire):
    async with House(wire) as house:
        yield house


# ---- the whole pipeline -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [1, 3])
async def test_three_workers_give_what_one_process_gives(journal_url, partitions):
    wire = await Wire.connect(journal_url, options=WireOptions(partitions=partitions))
    async with House(wire) as house:
        house.start_fakes(QUICK)
        turns = []
        for number in range(5):
            given = input_log((0, sound(30, number)), (1, sound(3, number + 1)))
            turns.append((new_turn(heard(0), heard(1)), given))
        for turn, given in turns:
            await house.ask(turn, given)
        for turn, given in turns:
            assert (await house.ended(turn.id)).state == "done"
            assert await house.logs(turn.id) == await computed(turn, given, QUICK)
    await wire.aclose()


async def test_a_text_turn_passes_one_stage(house):
    house.start_fakes(QUICK)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    assert (await house.ended(turn.id)).state == "done"
    assert await house.logs(turn.id) == await computed(turn, [], QUICK)


async def test_the_final_chunk_says_who_made_it(house):
    worker = house.start(FakeLanguageModel(QUICK))
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await house.ended(turn.id)
    log = await house.journal.read(turn.id, "tokens")
    assert [chunk.report.worker for chunk in log[-2:]] == ["", worker.consumer]


async def test_features_travel_as_blobs(house, wire):
    house.start_fakes(QUICK)
    turn = new_turn(heard(0))
    await house.ask(turn, input_log((0, sound(20))))
    await house.ended(turn.id)
    encoded = [chunk.encoded for chunk in await house.journal.read(turn.id, "encoded")]
    assert [e.features for e in encoded] == [b"", b""]
    keyed = [e.feature_key for e in encoded]
    assert all(key.startswith("{0}:blob:default:weights:") for key in keyed)
    assert await wire.blobs.exists(*keyed) == 2


async def test_more_turns_than_rows_wait_their_turn(house):
    house.start_fakes(QUICK, rows=1)
    turns = [new_turn(heard(0)) for _ in range(6)]
    await asyncio.gather(*(house.ask(turn, input_log((0, sound(5)))) for turn in turns))
    assert [(await house.ended(turn.id)).state for turn in turns] == ["done"] * 6


async def test_a_batch_turn_is_not_starved_by_interactive_ones(valkey_url):
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=LEASE, batch_patience=0))
    async with House(wire) as house:
        patient = new_turn(route=[LLM], job_class=JOB_CLASS_BATCH)
        turns = [new_turn(route=[LLM]) for _ in range(24)]
        for turn in (patient, *turns):
            await house.ask(turn)
        house.start(FakeLanguageModel(QUICK), rows=1)
        claimed = [(await house.ended(turn.id)).stages["llm"].claimed for turn in turns]
        batch = (await house.ended(patient.id)).stages["llm"].claimed
        assert sum(at < batch for at in claimed) == 7
    await wire.aclose()


async def test_rows_that_others_hold_are_not_claimed(house, wire):
    worker = house.start(FakeLanguageModel(QUICK), rows=1)
    assert worker._rows.try_acquire()
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await asyncio.sleep(LEASE)
    assert "claimed" not in str((await house.journal.head(turn.id)).stages["llm"].consumer)
    assert (await house.journal.head(turn.id)).stages["llm"].claimed == 0
    worker._rows.release()
    assert (await house.ended(turn.id)).state == "done"


async def test_a_row_taken_by_a_direct_call_in_between_hands_the_turn_back(house, monkeypatch):
    worker = house.start(FakeLanguageModel(QUICK), rows=1)
    sweep = worker._jobs.sweep
    stolen = asyncio.Event()

    async def sweep_and_lose_the_row(count):
        claims = await sweep(count)
        if claims and not stolen.is_set():
            assert worker._rows.try_acquire()
            stolen.set()
        return claims

    monkeypatch.setattr(worker._jobs, "sweep", sweep_and_lose_the_row)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await stolen.wait()
    worker._rows.release()
    assert (await house.ended(turn.id)).state == "done"


async def test_capacity_is_announced_and_withdrawn(house, wire):
    worker = house.start(FakeLanguageModel(QUICK), rows=3)
    ledger = Ledger(wire)
    async with asyncio.timeout(5):
        while (await ledger.usage())["llm"].capacity != 3:
            await asyncio.sleep(0.005)
    await house.leave(worker, 1)
    assert (await ledger.usage())["llm"].capacity == 0


# ---- take-over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "log", "count"), [("llm", "tokens", 20), ("detokenizer", "audio", 2)])
async def test_another_worker_goes_on_when_one_dies(house, name, log, count):
    workers = house.start_fakes(STEADY)
    turn, given = new_turn(heard(0)), input_log((0, sound(20)))
    await house.ask(turn, given)
    await house.until(turn.id, log, count)
    stage = workers[name]._bench.stage
    await house.kill(workers[name])
    house.start(stage)
    head = await house.ended(turn.id)
    assert head.state == "done"
    assert head.stages[name].take_overs >= 1  # a slow machine may lose a lease once more
    assert await house.logs(turn.id) == await computed(turn, given, QUICK)


class Noting(FakeDetokenizer):
    """Remembers what it was told to go on behind."""

    def __init__(self, timing):
        super().__init__(timing)
        self.published = []

    async def run(self, turn, inbox, published=()):
        self.published.append(published)
        async for chunk in super().run(turn, inbox, published):
            yield chunk


@pytest.mark.parametrize("lost", [False, True], ids=["there", "lost"])
async def test_who_goes_on_gets_the_committed_mels_back(house, wire, lost):
    workers = house.start_fakes(STEADY)
    turn, given = new_turn(heard(0)), input_log((0, sound(20)))
    await house.ask(turn, given)
    await house.until(turn.id, "audio", 2)
    await house.kill(workers["detokenizer"])
    log = await house.journal.read(turn.id, "audio")
    named = [chunk.speech.mel_key for chunk in log]
    assert all(named)
    assert not any(chunk.speech.mel for chunk in log)
    members = await wire.journal.smembers(keys.session_blobs("{0}", turn.session_id))
    assert set(named) <= {member.decode() for member in members}
    assert all([0 < await wire.blobs.pttl(name) <= 900_000 for name in named[:-1]])
    if lost:
        await wire.blobs.delete(*named)
    next_one = Noting(QUICK)
    house.start(next_one)
    assert (await house.ended(turn.id)).state == "done"
    assert await house.logs(turn.id) == await computed(turn, given, QUICK)
    assert [bool(chunk.speech.mel) for chunk in next_one.published[0]][:1] == [not lost]
    await eventually(lambda: all(worker._rows.used == 0 for worker in house.running))
    assert await wire.blobs.keys("{0}:blob:*:mel:*") == []  # nobody needs them any more


class Deleting(FakeDetokenizer):
    """Its session is deleted while it makes the second chunk, and the worker has not heard of it when it is made."""

    def __init__(self, journal):
        super().__init__(QUICK)
        self.journal = journal

    async def run(self, turn, inbox, published=()):
        async for chunk in super().run(turn, inbox, published):
            if chunk.index == 1:
                await self.journal.delete_session(turn.session_id)
            yield chunk


async def test_no_mel_outlives_a_deleted_session(house, wire, monkeypatch):
    async def deaf(self, feed):
        await asyncio.Event().wait()

    monkeypatch.setattr(Attempt, "_watch", deaf)
    house.start(FakeTokenizer(QUICK))
    house.start(FakeLanguageModel(QUICK))
    last = house.start(Deleting(house.journal))
    turn = new_turn(heard(0))
    await house.ask(turn, input_log((0, sound(3))))
    await eventually(lambda: last._rows.used)
    await eventually(lambda: not last._rows.used)
    assert await wire.blobs.keys("{0}:blob:*:mel:*") == []


async def test_another_tokenizer_goes_on_in_the_middle_of_the_clips(house):
    slow = FakeTokenizer(FakeTiming(clip_seconds=0.1))
    dying = house.start(slow)
    turn, given = new_turn(heard(0), heard(1)), input_log((0, sound(30)), (1, sound(20)))
    await house.ask(turn, given)
    await house.until(turn.id, "encoded", 2)
    await house.kill(dying)
    house.start_fakes(QUICK)
    assert (await house.ended(turn.id)).state == "done"
    assert await house.logs(turn.id) == await computed(turn, given, QUICK)


async def test_a_worker_that_was_frozen_cannot_write_any_more(house, monkeypatch):
    zombie = house.start(FakeLanguageModel(FakeTiming(steps=60, step_seconds=0.02)))
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 5)

    async def frozen():
        await asyncio.Event().wait()

    async def nothing(count):
        return []

    monkeypatch.setattr(zombie, "_heartbeat", frozen)
    monkeypatch.setattr(zombie._jobs, "recover", nothing)
    monkeypatch.setattr("kimia.runtime.attempt.Attempt._watch", lambda self, feed: frozen())
    house.start(FakeLanguageModel(QUICK))
    head = await house.ended(turn.id)
    assert (head.state, head.stages["llm"].take_overs) == ("done", 1)
    await eventually(lambda: zombie._rows.used == 0)
    assert await house.logs(turn.id) == await computed(turn, [], QUICK)


async def test_a_worker_that_left_hands_its_turns_over(house):
    leaving = house.start(FakeLanguageModel(FakeTiming(steps=60, step_seconds=0.02)))
    house.start(FakeDetokenizer(QUICK))
    turn = new_turn(route=ROUTE[1:])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 5)
    await house.leave(leaving, 0)
    log = await house.journal.read(turn.id, "tokens")
    assert not log[-1].final
    house.start(FakeLanguageModel(QUICK))
    head = await house.ended(turn.id)
    assert (head.state, head.stages["llm"].take_overs) == ("done", 1)
    assert await house.logs(turn.id) == await computed(turn, [], QUICK)


async def test_draining_lets_turns_end_and_claims_no_more(house):
    leaving = house.start(FakeLanguageModel(FakeTiming(steps=40, step_seconds=0.005)))
    first, second = new_turn(route=[LLM]), new_turn(route=[LLM])
    await house.ask(first)
    await house.until(first.id, "tokens", 1)
    drained = asyncio.create_task(house.leave(leaving, 5))
    await asyncio.sleep(0.01)
    await house.ask(second)
    await drained
    assert (await house.journal.head(first.id)).state == "done"
    assert (await house.journal.head(second.id)).stages["llm"].claimed == 0


async def test_an_idle_worker_leaves_at_once_and_without_a_trace(house, wire):
    worker = house.start(FakeLanguageModel(QUICK))
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await house.ended(turn.id)
    before = asyncio.all_tasks()
    await house.leave(worker, 5)
    assert asyncio.all_tasks() < before
    for stream in keys.CLASSES:
        assert await wire.journal.xinfo_consumers(keys.jobs("{0}", "llm", stream), keys.GROUP) == []


# ---- lead -------------------------------------------------------------------------------------------------------

LONG = FakeTiming(steps=200)
SPEECH = (200 - DELAY - 1) * CODE_SECONDS  # seconds
LEAD = 4.0


class Player:
    """A caller that says how far it has heard, and what its turn may have given out by then."""

    def __init__(self, house, turn):
        self.house = house
        self.turn = turn
        self.start = 0.0

    async def heard(self, seconds):
        self.start = time.monotonic() - seconds
        await self.house.journal.note_playback(self.turn.id, Playback(seconds, 0.0))

    async def check(self):
        """No log is further ahead than the rule allows. Raises AssertionError. Answers how far both are."""
        head = await self.house.journal.head(self.turn.id)
        tokens = await self.house.journal.read(self.turn.id, "tokens")
        audio = await self.house.journal.read(self.turn.id, "audio")
        reach = time.monotonic() - self.start + LEAD
        most = next(codes for codes in range(1000) if LOW_LATENCY.spoken(codes) * CODE_SECONDS >= reach)
        assert sum(chunk.step.HasField("code") for chunk in tokens) <= most
        assert sum(map(sound_seconds, audio[:-1])) < reach
        return head, len(tokens), len(audio)

    async def parked(self, *workers):
        """Until the turn is parked everywhere, and does not go on."""
        await eventually(lambda: all(worker._rows.parked for worker in workers))
        return await self.check()


async def played(house):
    """A turn of which the caller says from the start that it has heard nothing yet."""
    turn = new_turn(heard(0))
    await house.ask(turn, input_log((0, sound(20))))
    player = Player(house, turn)
    await player.heard(0.0)
    return player


async def same(house, turn, timing=LONG):
    """The logs of a turn are those of one that nobody paced."""
    assert (await house.ended(turn.id)).state == "done"
    assert await house.logs(turn.id) == await computed(turn, input_log((0, sound(20))), timing)


async def test_a_slow_player_holds_the_stages_back_and_gets_the_same_answer(house):
    workers = house.start_fakes(LONG)
    player = await played(house)
    ahead = [(await player.parked(workers["llm"], workers["detokenizer"]))[1:]]
    for seconds in (2.0, 5.0):
        await player.heard(seconds)
        await house.until(player.turn.id, "audio", ahead[-1][1] + 1)
        ahead.append((await player.parked(workers["llm"], workers["detokenizer"]))[1:])
    assert all(before < after for before, after in pairwise(ahead))
    await player.heard(SPEECH)
    await same(house, player.turn)
    await eventually(lambda: not any(worker._rows.used or worker._rows.parked for worker in workers.values()))


async def test_two_turns_share_one_row(house):
    workers = house.start_fakes(LONG, rows=1)
    players = [await played(house) for _ in range(2)]
    await eventually(lambda: all(workers[name]._rows.parked == 2 for name in ("llm", "detokenizer")))
    for player in players:
        await player.check()
        await player.heard(SPEECH)
    for player in players:
        await same(house, player.turn)


async def test_a_turn_that_nobody_reports_on_gives_its_row_to_one_that_runs_out(house):
    """With one row: the listener is served though a turn that goes into a file has begun meanwhile."""
    endless = FakeTiming(steps=20_000)
    llm = house.start(FakeLanguageModel(endless), rows=1)
    house.start(FakeTokenizer(LONG))
    house.start(FakeDetokenizer(LONG))
    player = await played(house)
    await player.parked(llm)
    silent = new_turn()
    await house.ask(silent)
    await house.until(silent.id, "tokens", 100)
    before = (await player.check())[1]
    await player.heard(6.0)
    await house.until(player.turn.id, "tokens", before + 1)
    await player.parked(llm)
    so_far = len(await house.journal.read(silent.id, "tokens"))
    await house.until(silent.id, "tokens", so_far + 1)


async def test_a_client_that_vanished_gets_its_answer_computed_all_the_same(valkey_url):
    brief = FakeTiming(steps=40)
    wire = await Wire.connect(valkey_url, options=WireOptions(lead=1.5))
    async with House(wire) as house:
        house.start_fakes(brief)
        player = await played(house)
        await same(house, player.turn, brief)
    await wire.aclose()


@pytest.mark.parametrize("how", ["dies", "leaves"])
@pytest.mark.parametrize("name", ["llm", "detokenizer"])
async def test_a_parked_turn_changes_hands_and_is_paced_there_too(house, name, how):
    workers = house.start_fakes(LONG)
    player = await played(house)
    await player.parked(workers["llm"], workers["detokenizer"])
    await (house.kill(workers[name]) if how == "dies" else house.leave(workers[name], 0))
    new = house.start(build(name, LONG))
    head, tokens, _ = await player.parked(new)
    assert head.stages[name].take_overs == 1
    assert tokens < 200
    await player.heard(SPEECH)
    await same(house, player.turn)


async def test_a_parked_turn_is_held_for_longer_than_a_lease(house):
    workers = house.start_fakes(LONG)
    player = await played(house)
    await player.parked(workers["llm"])
    for name in ("llm", "detokenizer"):
        house.start(build(name, LONG))
    await asyncio.sleep(2 * LEASE)
    head, *_ = await player.check()
    assert [head.stages[name].take_overs for name in ("llm", "detokenizer")] == [0, 0]


async def test_a_cancel_ends_a_parked_turn_at_once(house):
    workers = house.start_fakes(LONG)
    player = await played(house)
    await player.parked(workers["llm"], workers["detokenizer"])
    await house.journal.cancel(player.turn.id)
    await eventually(lambda: not any(worker._rows.used or worker._rows.parked for worker in workers.values()))
    assert (await house.journal.head(player.turn.id)).state == "cancelled"


async def test_what_comes_back_after_a_take_over_is_measured(house):
    def measured():
        return [REGISTRY.get_sample_value(f"kimia_{name}_seconds_count", {"stage": "llm"}) or 0 for name in counted]

    counted = ("first_chunk", "rebuild")
    before = measured()
    slow = FakeLanguageModel(FakeTiming(steps=60, step_seconds=0.02))
    leaving, turn = house.start(slow), new_turn(route=[LLM])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 5)
    assert [after - was for after, was in zip(measured(), before, strict=True)] == [1, 0]
    await house.leave(leaving, 0)
    house.start(FakeLanguageModel(QUICK))
    await house.ended(turn.id)
    assert [after - was for after, was in zip(measured(), before, strict=True)] == [1, 1]


# ---- cancelling -------------------------------------------------------------------------------------------------


class Stuck(FakeLanguageModel):
    """Gives one step and then waits for ever; knows when it was closed."""

    def __init__(self):
        super().__init__()
        self.closed = 0

    async def run(self, turn, inbox, published=()):
        try:
            yield Chunk(index=0)
            await asyncio.Event().wait()
        finally:
            self.closed += 1


async def test_cancel_frees_the_rows_at_once(house):
    stuck = Stuck()
    workers = [house.start(stuck), house.start(FakeDetokenizer(QUICK))]
    turn = new_turn(route=ROUTE[1:])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 1)
    await eventually(lambda: all(worker._rows.used == 1 for worker in workers))
    assert await house.journal.cancel(turn.id)
    await eventually(lambda: all(worker._rows.used == 0 for worker in workers))
    assert stuck.closed == 1
    assert (await house.journal.head(turn.id)).state == "cancelled"


async def test_a_stage_that_never_waits_is_stopped_by_what_it_publishes(house, monkeypatch):
    worker = house.start(FakeLanguageModel(FakeTiming(steps=1_000_000)))
    monkeypatch.setattr("kimia.runtime.attempt.Attempt._watch", lambda self, feed: asyncio.Event().wait())
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 1)
    await house.journal.cancel(turn.id)
    await eventually(lambda: worker._rows.used == 0)


async def test_a_deleted_session_ends_its_turns(house):
    from kimia.v1.session_pb2 import SessionRecord

    stuck = Stuck()
    worker = house.start(stuck)
    turn = new_turn(route=[LLM])
    await house.journal.save_session(SessionRecord(id=turn.session_id, turn_ids=[turn.id]), 0)
    await house.ask(turn)
    await house.until(turn.id, "tokens", 1)
    await house.journal.delete_session(turn.session_id)
    await eventually(lambda: worker._rows.used == 0)
    assert stuck.closed == 1


# ---- failures ---------------------------------------------------------------------------------------------------


class Failing(FakeLanguageModel):
    """Raises after two steps, so many times in all."""

    def __init__(self, error, times=10**6):
        super().__init__(QUICK)
        self.error = error
        self.times = times
        self.runs = 0

    async def run(self, turn, inbox, published=()):
        self.runs += 1
        async for chunk in super().run(turn, inbox, published):
            if chunk.index >= 2 and self.times:
                self.times -= 1
                raise self.error
            yield chunk


async def test_an_error_of_the_stage_ends_the_turn_with_its_reason(house):
    failing = Failing(AudioError("message 0: no sound"))
    worker = house.start(failing)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    head = await house.ended(turn.id)
    assert (head.state, head.failure.reason) == ("error", "INVALID_AUDIO")
    assert failing.runs == 1
    await eventually(lambda: worker._rows.used == 0)


@pytest.mark.parametrize("error", [ValueError("a bug"), UnavailableError("Triton is away")], ids=["bug", "outage"])
async def test_one_failure_does_not_end_a_turn(house, error):
    failing = Failing(error, times=2)
    house.start(failing)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    assert (await house.ended(turn.id)).state == "done"
    assert failing.runs == 3
    assert await house.logs(turn.id) == await computed(turn, [], QUICK)


async def test_a_turn_that_fails_every_worker_is_given_up(house, wire):
    failing = Failing(ValueError("a bug"))
    worker = house.start(failing)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    head = await house.ended(turn.id)
    assert (head.state, head.failure.reason) == ("error", "GAVE_UP")
    most = 1 + wire.options.max_deliveries  # the first run made progress
    assert most - 1 <= failing.runs <= most  # a slow machine may lose a lease before a run begins
    assert await wire.journal.xlen(keys.dlq("{0}", "llm")) == 1
    await eventually(lambda: worker._rows.used == 0)


class Unfinished(FakeLanguageModel):
    async def run(self, turn, inbox, published=()):
        yield Chunk(index=0)


async def test_a_stage_that_ends_too_early_is_an_error(house):
    house.start(Unfinished())
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    head = await house.ended(turn.id)
    assert (head.state, head.failure.reason) == ("error", "INTERNAL")


async def test_sound_that_is_not_there_is_told(house):
    house.start_fakes(QUICK)
    turn = new_turn(heard(0, source_turn="gone.t", source_number=3))
    await house.ask(turn)
    head = await house.ended(turn.id)
    assert (head.failure.reason, head.failure.field) == ("NOT_FOUND", "messages[0]")


async def test_a_loop_survives_what_nobody_expected(house, monkeypatch):
    worker = house.start(FakeLanguageModel(QUICK))
    sweep, calls = worker._jobs.sweep, []

    async def failing_once(count):
        calls.append(count)
        if len(calls) == 1:
            raise ValueError("a bug")
        return await sweep(count)

    monkeypatch.setattr(worker._jobs, "sweep", failing_once)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    assert (await house.ended(turn.id)).state == "done"


async def test_a_lost_journal_is_waited_out(house, wire):
    house.start_fakes(STEADY)
    turn, given = new_turn(heard(0)), input_log((0, sound(20)))
    await house.ask(turn, given)
    for count in (5, 20, 35):
        await house.until(turn.id, "tokens", count)
        await wire.journal.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert (await house.ended(turn.id)).state == "done"
    assert await house.logs(turn.id) == await computed(turn, given, QUICK)


async def test_a_journal_that_lost_writes_gets_them_again(house, wire):
    """As after a fail-over: the log and the head have fallen back."""
    house.start(FakeLanguageModel(FakeTiming(steps=60, step_seconds=0.01)))
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 20)
    head, log = keys.head("{0}", turn.id), keys.log("{0}", turn.id, "tokens")
    async with wire.journal.pipeline(transaction=True) as pipe:
        pipe.delete(log)
        for chunk in (await house.journal.read(turn.id, "tokens"))[:7]:
            pipe.xadd(log, {"c": chunk.SerializeToString()}, id=f"{chunk.index + 1}-0")
        pipe.hset(head, "tokens:next", 7)
        await pipe.execute()
    assert (await house.ended(turn.id)).state == "done"
    assert await house.logs(turn.id) == await computed(turn, [], QUICK)


# ---- history and lost blobs -------------------------------------------------------------------------------------


async def with_history(house):
    """A finished first turn, and a second whose first message is the sound of the first."""
    first, given = new_turn(heard(0)), input_log((0, sound(30)))
    await house.ask(first, given)
    await house.ended(first.id)
    encoded = [chunk.encoded for chunk in await house.journal.read(first.id, "encoded")]
    past = heard(
        0,
        source_turn=first.id,
        source_number=0,
        codes=[code for e in encoded for code in e.codes],
        feature_keys=[e.feature_key for e in encoded],
    )
    return past, [e.feature_key for e in encoded]


def spoken(number, *codes):
    message = Message(spoken=Spoken())
    message.spoken.clip.number = number
    message.spoken.clip.codes.extend(codes)
    return message


async def one_go(past, *others):
    """The tokens of a turn whose clips all are new."""
    fresh = heard(0)
    clips = input_log((0, sound(30)), *((m.audio.number, sound(8, m.audio.number)) for m in others))
    return (await computed(new_turn(fresh, *others), clips, QUICK))["tokens"]


@pytest.mark.parametrize("lost", [False, True], ids=["there", "lost"])
async def test_history_is_read_by_its_blobs_or_encoded_again(house, wire, lost):
    house.start_fakes(QUICK)
    past, blobs = await with_history(house)
    if lost:
        await wire.blobs.delete(blobs[1])
    turn = new_turn(past, heard(1))
    await house.ask(turn, input_log((1, sound(8, 1))))
    assert (await house.ended(turn.id)).state == "done"
    assert [content(c) for c in await house.journal.read(turn.id, "tokens")] == await one_go(past, heard(1))
    encoded = await house.journal.read(turn.id, "encoded")
    assert [(c.index, c.encoded.clip, c.final) for c in encoded] == [(0, 1, True)]
    assert await wire.blobs.exists(*blobs) == len(blobs)


async def test_history_alone_is_encoded_again_though_the_tokenizer_is_not_on_the_route(house, wire):
    house.start_fakes(QUICK)
    past, blobs = await with_history(house)
    await wire.blobs.delete(*blobs)
    turn = new_turn(past, spoken(1, 4, 5), route=[LLM])
    await house.ask(turn)
    assert (await house.ended(turn.id)).state == "done"
    expected = await one_go(past)
    assert [c.step.audio_id for c in await house.journal.read(turn.id, "tokens")] == [c.step.audio_id for c in expected]
    assert await wire.blobs.exists(*blobs) == len(blobs)


async def test_own_features_that_are_gone_are_made_again(house, wire):
    """The blobs vanish between the stages."""
    house.start(FakeTokenizer(QUICK))
    turn, given = new_turn(heard(0), route=ROUTE[:2]), input_log((0, sound(30)))
    await house.ask(turn, given)
    await house.until(turn.id, "encoded", 3)
    first = await house.journal.read(turn.id, "encoded")
    await wire.blobs.delete(*(c.encoded.feature_key for c in first))
    house.start(FakeLanguageModel(QUICK))
    assert (await house.ended(turn.id)).state == "done"
    assert await house.journal.read(turn.id, "encoded") == first
    assert await house.logs(turn.id) == await computed(turn, given, QUICK)


async def test_without_a_blob_store_features_travel_in_the_log(house, monkeypatch):
    async def put(self, *_):
        raise UnavailableError("no blobs today")

    monkeypatch.setattr("kimia.streams.blobs.Blobs.put", put)
    monkeypatch.setattr("kimia.streams.blobs.Blobs.put_all", put)
    house.start_fakes(QUICK)
    turn, given = new_turn(heard(0)), input_log((0, sound(30, 77)))
    await house.ask(turn, given)
    assert (await house.ended(turn.id)).state == "done"
    assert all(c.encoded.features for c in await house.journal.read(turn.id, "encoded"))
    assert await house.logs(turn.id) == await computed(turn, given, QUICK)


async def test_a_worker_whose_network_is_cut_in_a_turn_is_fenced_and_serves_again_when_it_is_back(house, valkey_url):
    """Its connections are black holes, and new ones are refused, until another worker has ended its turn."""
    address = valkey_url.removeprefix("redis://").removesuffix("/0")
    timing = FakeTiming(steps=150, step_seconds=0.01)
    async with Proxy(address) as proxy:
        wire = await Wire.connect(f"redis://{proxy.address}/0", options=WireOptions(lease=LEASE))
        cut = Worker(FakeLanguageModel(timing), wire, Rows(1), "cut", "weights")
        running = asyncio.create_task(cut.run())
        turn = new_turn(route=[LLM])
        await house.ask(turn)
        await house.until(turn.id, "tokens", 5)
        proxy.silence("127.0.0.1:1")
        other = house.start(FakeLanguageModel(timing))
        assert (await house.ended(turn.id)).state == "done"
        assert await house.logs(turn.id) == await computed(turn, [], timing)
        await house.kill(other)
        proxy.target = address
        later = new_turn(route=[LLM])
        await house.ask(later)
        async with asyncio.timeout(4 * SECONDS):
            while (head := await house.journal.head(later.id)).state != "done":
                await asyncio.sleep(0.05)
        assert head.stages["llm"].consumer == "cut"
        assert (await house.journal.head(turn.id)).stages["llm"].consumer == other.consumer
        assert await house.logs(turn.id) == await computed(turn, [], timing)
        await cut.drain(0)
        await running
        await wire.aclose()


# ---- a turn that has its conversation in one worker's cache -------------------------------------------------------


@pytest.fixture
async def patient(valkey_url, request):
    """Two workers of the language model, and a house whose turns are left to one of them for so long."""
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=30, prefix_patience=request.param))
    async with House(wire) as house:
        holder, other = (house.start(FakeLanguageModel(STEADY), rows=1) for _ in range(2))
        await looks(house, holder)
        yield house, holder, other
    await wire.aclose()


async def looks(house, worker):
    """Until a worker has said that it has a row and looks for turns."""
    free = keys.worker_jobs("{0}", "llm", worker.consumer) + ":free"
    async with asyncio.timeout(SECONDS):
        while not await house.wire.journal.exists(free):
            await asyncio.sleep(0.002)


async def served(house, worker, count=1) -> list[str]:
    """Who serves turns that would like this worker, one after another."""
    names = []
    for _ in range(count):
        turn = new_turn(route=[LLM])
        await house.ask(turn, worker=worker.consumer)
        head = await house.ended(turn.id)
        assert head.state == "done"
        names.append(head.stages["llm"].consumer)
    return names


NEVER, SOON = 60.0, 0.2  # seconds; no test waits for the first


@pytest.mark.parametrize("patient", [NEVER], indirect=True)
async def test_turns_go_to_the_worker_that_they_would_like(patient):
    house, *workers = patient
    for worker in workers * 4:
        await looks(house, worker)
        assert await served(house, worker) == [worker.consumer]


@pytest.mark.parametrize("patient", [NEVER], indirect=True)
async def test_nobody_waits_for_a_worker_that_is_busy(patient):
    house, holder, other = patient
    turn = new_turn(route=[LLM])
    for worker in (holder, other):
        worker._bench.stage.timing = FakeTiming(steps=100000, step_seconds=0.002)
    await house.ask(turn, worker=holder.consumer)
    await house.until(turn.id, "tokens", 1)
    if (await house.journal.head(turn.id)).stages["llm"].consumer != holder.consumer:  # where the machine is slow
        holder, other = other, holder
    other._bench.stage.timing = STEADY
    assert await served(house, holder, 3) == [other.consumer] * 3
    await house.journal.cancel(turn.id)


@pytest.mark.parametrize("patient", [SOON], indirect=True)
async def test_the_turn_of_a_dead_worker_is_taken_soon(patient):
    house, holder, other = patient
    await house.kill(holder)
    assert await served(house, holder, 2) == [other.consumer] * 2


def freeze(worker, monkeypatch):
    """A worker that says that it lives and takes nothing; the event that ends this."""
    thawed = asyncio.Event()

    async def sweep(_):
        await thawed.wait()
        return []

    monkeypatch.setattr(worker._jobs, "sweep", sweep)
    return thawed


@pytest.mark.parametrize("patient", [SOON], indirect=True)
async def test_the_turn_of_a_frozen_worker_is_taken_soon(patient, monkeypatch):
    house, holder, other = patient
    thawed = freeze(holder, monkeypatch)
    assert set(await served(house, holder, 3)) <= {other.consumer, holder.consumer}
    assert await served(house, holder, 2) == [other.consumer] * 2  # it may have begun a look before
    thawed.set()


@pytest.mark.parametrize("patient", [NEVER], indirect=True)
async def test_a_worker_that_leaves_gives_back_what_it_left_to_another(patient, monkeypatch):
    house, holder, other = patient
    thawed = freeze(holder, monkeypatch)
    await served(house, other)
    turn = new_turn(route=[LLM])
    await house.ask(turn, worker=holder.consumer)
    monkeypatch.undo()
    thawed.set()
    await house.leave(other, 1)
    assert (await house.ended(turn.id)).state == "done"


class Remembering(FakeLanguageModel):
    """A stage that is told what to forget."""

    def __init__(self, timing):
        super().__init__(timing)
        self.forgotten = []

    def forget(self, session_id):
        self.forgotten.append(session_id)


@pytest.mark.parametrize("running", [False, True])
async def test_what_a_stage_keeps_of_a_deleted_session_is_forgotten(house, running):
    stage = Remembering(FakeTiming(steps=100000, step_seconds=0.002) if running else QUICK)
    worker = house.start(stage)
    turn = new_turn(route=[LLM])
    await house.ask(turn)
    await house.until(turn.id, "tokens", 1)
    if not running:
        await house.ended(turn.id)
        await eventually(lambda: not worker._attempts)
    await house.journal.delete_session(turn.session_id)
    await eventually(lambda: turn.session_id in stage.forgotten and not worker._attempts)
    assert set(stage.forgotten) == {turn.session_id}
    assert len(stage.forgotten) == 1 + running  # once more when its turn has ended, which may leave something
