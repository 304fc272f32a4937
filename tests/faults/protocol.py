"""A state machine over the stream protocol: orchestrators, workers and zombies in any order, against a real server.

After every step the whole server is compared with the model of `truth.py`. No rule sleeps: leases and idle times are
moved. Every attempt that was ever made may act at any later time, whatever has become of its turn: so a worker that was
paused, cut off, or thought dead is in every example. In the end fresh workers and the orchestrators finish everything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, initialize, invariant, multiple, precondition, rule

from kimia.errors import NotFoundError, StateError
from kimia.stage import LLM, STAGES
from kimia.streams import keys
from kimia.streams.journal import Playback
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, Failure, Turn
from tests.faults.ground import HOUR, OPTIONS, P
from tests.faults.play import READERS, SESSIONS, Attempt, Delivery, Play
from tests.faults.truth import LENGTH, LOGS, demand

ROUTES = (("llm",), ("tokenizer", "llm"), ("llm", "detokenizer"), ("tokenizer", "llm", "detokenizer"))
MOST_TURNS = 4
NUMBERS = st.sampled_from((1, 2))  # workers of a stage
PICKS = st.integers(0, len(STAGES) - 1)


class Protocol(Play):
    """What orchestrators, workers, time and servers do."""

    turns = Bundle("turns")
    attempts = Bundle("attempts")
    deliveries = Bundle("deliveries")

    # ---- orchestrators --------------------------------------------------------------------------------------------

    @initialize(target=turns, route=st.sampled_from(ROUTES), deadline=st.sampled_from((None, "far")))
    def ask(self, route: Sequence[str], deadline: str | None = None) -> str:
        """A turn that is opened, told and submitted without any trouble."""
        turn = self._new(SESSIONS[0], route, deadline)
        self.wanted[turn.id] = turn
        self.see_to(turn.id)
        return turn.id

    @precondition(lambda self: len(self.wanted) < MOST_TURNS)
    @rule(
        target=turns,
        session=st.sampled_from(SESSIONS),
        route=st.sampled_from(ROUTES),
        key=st.sampled_from(("", "", "again")),
        deadline=st.sampled_from((None, "far", "far", "past")),
        batch=st.booleans(),
        whole=st.booleans(),
    )
    def open(self, session: str, route: Sequence[str], key: str, deadline: str | None, batch: bool, whole: bool) -> str:
        """Begin a turn; `whole`: and submit it."""
        turn = self._new(session, route, deadline)
        turn.idempotency_key = key
        if batch:
            turn.job_class = JOB_CLASS_BATCH
        self.wanted[turn.id] = turn
        self.open_turn(turn, READERS[0])
        if whole:
            self.see_to(turn.id)
        return turn.id

    @rule(turn=turns, reader=st.sampled_from(READERS), takes=st.booleans())
    def another_reader(self, turn: str, reader: str, takes: bool) -> None:
        if takes:
            self.take_over_reading(turn, reader)
        else:
            self.open_again(turn, reader)

    def open_again(self, turn: str, reader: str) -> None:
        """The answer was lost, or another connection asks for the same."""
        self.open_turn(self.wanted[turn], reader)

    @rule(turn=turns)
    def see_to_it(self, turn: str) -> None:
        """After a fail-over its orchestrator opens and submits it again."""
        self.see_to(turn)

    @rule(turn=turns, start=st.integers(0, 2), count=st.integers(1, 2), old=st.booleans())
    def append_input(self, turn: str, start: int, count: int, old: bool) -> None:
        """The next pieces, or such that are there, or too late ones; `old`: by who was the reader before."""
        self.append(turn, self._token(turn) - old, start, min(count, LENGTH["input"] - start))

    @rule(turn=turns, worker=st.sampled_from((None, "llm-1")), old=st.booleans(), answers_lost=st.integers(0, 1))
    def submit(self, turn: str, worker: str | None, old: bool, answers_lost: int) -> None:
        for _ in range(1 + answers_lost):
            self.submit_turn(turn, self._token(turn) - old, worker)

    @rule(turn=turns, seconds=st.integers(0, 3))
    def hear(self, turn: str, seconds: int) -> None:
        """Its client says how far it has heard it, whoever reads it, and however late."""
        if turn in self.truth.turns:
            self.truth.turns[turn].hear(seconds)
        self.ground.run(self.journal.note_playback(turn, Playback(seconds, 0.0)))

    @rule(turn=turns, how=st.sampled_from(("cancelled", "failed", "expired", "expired but for its input", "deleted")))
    def stop(self, turn: str, how: str) -> None:
        if how in ("cancelled", "failed"):
            self.end(turn, how == "failed")
        else:
            self.lose(turn, how)

    def end(self, turn: str, failed: bool) -> None:
        """Cancelled by its caller, or failed by its orchestrator."""
        call = self.journal.fail(turn, Failure(reason="LOST")) if failed else self.journal.cancel(turn)
        found = self.truth.turns.get(turn)
        ended = found is not None and found.end(*(("error", "LOST") if failed else ("cancelled",)))
        demand(self.ground.run(call) == ended, "an end that", "came" if ended else "did not come")

    def lose(self, turn: str, how: str) -> None:
        """A turn is forgotten, since nobody wrote for so long; or its session is deleted."""
        found = self.truth.living(turn)
        if how == "deleted":
            session = keys.session_of(turn)
            wanted = None if self.truth.delete(session) else NotFoundError
            demand(self.answer(self.journal.delete_session(session)) == wanted, "a session deleted otherwise")
        elif found:
            logs = [log for log in LOGS if how == "expired" or log != "input"]
            self.ground.forget(keys.head(P, turn), *(keys.log(P, turn, log) for log in logs))
            found.vanish(logs)

    @rule(turn=turns)
    def look(self, turn: str) -> None:
        """Whoever follows a turn sees that its deadline has passed."""
        found = self.truth.turns.get(turn)
        late = found is not None and found.is_late
        demand(self.ground.run(self.journal.drop_late(turn)) == late, "dropped" if not late else "not dropped", turn)
        if found and late:
            found.end("error", "DEADLINE_EXCEEDED")

    @rule(session=st.sampled_from(SESSIONS), behind=st.booleans())
    def save(self, session: str, behind: bool) -> None:
        found, _ = self.truth.sessions.get(session, (0, b""))
        version = max(found - behind, 0)
        record = SessionRecord(id=session, turn_ids=sorted(self.truth.members.get(session, ())))
        saved = (version + 1, record.SerializeToString())
        if session in self.truth.deleted or (found == 0 and version > 0):
            wanted: Any = NotFoundError
        elif version == found or self.truth.sessions.get(session) == saved:
            wanted, self.truth.sessions[session] = version + 1, saved
        else:
            wanted = StateError
        demand(self.answer(self.journal.save_session(record, version)) == wanted, "a record saved otherwise")

    # ---- workers --------------------------------------------------------------------------------------------------

    @rule(target=attempts, pick=PICKS, number=NUMBERS, count=st.integers(1, 3))
    def sweep(self, pick: int, number: int, count: int) -> MultipleResults[Attempt]:
        """A worker of a stage that turns wait for takes new ones."""
        stage = self._stage(pick)
        jobs = self.workers[stage, number]
        return self.taken(stage, jobs, self.ground.run(jobs.sweep(count)))

    @rule(target=attempts, pick=PICKS, number=NUMBERS, count=st.integers(1, 3), lost=st.booleans())
    def recover(self, pick: int, number: int, count: int, lost: bool) -> MultipleResults[Attempt]:
        """It takes those whose worker fell silent; `lost`: the answer never reaches it."""
        stage = self._stage(pick)
        jobs = self.workers[stage, number]
        return self.taken(stage, jobs, self.ground.run(jobs.recover(count)), lost)

    @rule(target=attempts, attempt=attempts, number=NUMBERS, hours=st.sampled_from((0, 0, 2)))
    def take_over(self, attempt: Attempt, number: int, hours: int = 0) -> MultipleResults[Attempt]:
        """A worker falls silent, and another goes on, maybe hours later (or the same, thinking itself a new one)."""
        if hours:
            self.clock_jumps(hours=hours)
        if attempt.turn in self.truth.turns:
            self.fall_silent(attempt.turn, attempt.kind.name)
        jobs = self.workers[attempt.kind.name, number]
        return self.taken(attempt.kind.name, jobs, self.ground.run(jobs.recover(1)))

    @rule(target=attempts, pick=PICKS, number=NUMBERS, chunks=st.integers(1, 2))
    def serve(self, pick: int, number: int, chunks: int) -> MultipleResults[Attempt]:
        """It takes what waits, and begins."""
        attempts = self.sweep(pick=pick, number=number, count=3)
        for attempt in attempts.values:
            self.publish_chunks(attempt, range(attempt.at, min(attempt.at + chunks, len(attempt.chunks))))
        return attempts

    def deliver(self, pick: int, number: int, silent: bool) -> Delivery:
        """A worker stops between taking entries and claiming them."""
        stage = self._stage(pick)
        jobs = self.workers[stage, number]
        streams = jobs._classes(P) if silent else [*jobs._own(P), *jobs._classes(P)]
        last = round(OPTIONS.lease * 1000) if silent else jobs._own_ttl()
        call = self.wire.call("recover" if silent else "take", streams, [jobs._consumer, 3, last, last])
        return Delivery(jobs, stage, streams, self.ground.run(call))

    @rule(target=deliveries, pick=PICKS, number=NUMBERS, silent=st.booleans(), twice=st.booleans())
    def deliver_only(self, pick: int, number: int, silent: bool, twice: bool) -> MultipleResults[Delivery]:
        """A worker stops there; `twice`: for so long that another takes the entries, and stops there too."""
        first = self.deliver(pick, number, silent)
        if not twice:
            return multiple(first)
        self.all_silent()
        return multiple(first, self.deliver(pick, 3 - number, True))

    @rule(target=attempts, delivery=deliveries)
    def claim_late(self, delivery: Delivery) -> MultipleResults[Attempt]:
        """It wakes up, and claims what may be another's by now."""
        jobs, consumer = delivery.jobs, delivery.jobs._consumer
        mine = [pair for pair in delivery.entries() if self.view.holder(*pair) == consumer]
        claims = self.ground.run(jobs._claim_all(P, delivery.streams, delivery.answer))
        copies = any(":@" in stream for stream, _ in mine)
        for claim in claims:
            demand(copies or (claim.job_key, claim.job_id) in mine, "a claim of an entry that is another's")
        return self.taken(delivery.stage, jobs, claims)

    @rule(attempt=attempts, move=st.sampled_from((0, 0, 0, -1, 1)), answers_lost=st.integers(0, 1))
    def publish(self, attempt: Attempt, move: int, answers_lost: int) -> None:
        """The next chunk, the one before, or the one behind; again where the answer was lost."""
        index = min(max(attempt.at + move, 0), len(attempt.chunks) - 1)
        for _ in range(1 + answers_lost):
            self.publish_chunks(attempt, [index])

    @rule(attempt=attempts)
    def publish_rest(self, attempt: Attempt) -> None:
        """All that is left, in one round trip."""
        self.publish_chunks(attempt, range(attempt.at, len(attempt.chunks)))

    @rule(attempt=attempts)
    def heartbeat(self, attempt: Attempt) -> None:
        self.beat(attempt)

    @rule(attempt=attempts, answers_lost=st.integers(0, 1))
    def release(self, attempt: Attempt, answers_lost: int) -> None:
        self.turn_of(attempt).release(attempt.kind.name, attempt.number)
        for _ in range(1 + answers_lost):
            self.ground.run(attempt.jobs.release(attempt.claim))

    @rule(attempt=attempts, answers_lost=st.integers(0, 1))
    def give_up(self, attempt: Attempt, answers_lost: int) -> None:
        """The stage fails, or it misses features and puts the turn back to the tokenizer."""
        found, rewinds = self.turn_of(attempt), attempt.kind is LLM
        if rewinds:
            found.rewind(attempt.number)
        elif found.held(attempt.kind.name, attempt.number):
            found.end("error", "BROKEN")
        for _ in range(1 + answers_lost):
            jobs, claim = attempt.jobs, attempt.claim
            self.ground.run(jobs.rewind(claim) if rewinds else jobs.fail(claim, Failure(reason="BROKEN")))

    @rule(stage=st.sampled_from(list(STAGES)), number=NUMBERS, politely=st.booleans())
    def start_again(self, stage: str, number: int, politely: bool) -> None:
        """A new process under the old name; what the old one held is left to others."""
        if politely:
            self.ground.run(self.workers[stage, number].aclose())
        self.restart((stage, number))

    # ---- time and the server --------------------------------------------------------------------------------------

    @rule(attempt=attempts, how=st.sampled_from(("both", "entry", "lease", "all")))
    def silence(self, attempt: Attempt, how: str) -> None:
        """The turn's worker gives no sign of life: its entry ages, its lease ends, or one of them; or nobody does."""
        if how == "all":
            self.all_silent()
        elif attempt.turn in self.truth.turns:
            self.fall_silent(attempt.turn, attempt.kind.name, entry=how != "lease", lease=how != "entry")

    @rule(hours=st.sampled_from((2, -2)))
    def clock_jumps(self, hours: int) -> None:
        self.ground.jump(self.truth.turns, hours * HOUR)
        for found in self.truth.turns.values():
            if found.time_left is not None:
                found.time_left -= hours
        if hours > 0:
            self.all_silent()

    @precondition(lambda self: len(self.past) > 1)
    @rule(steps=st.sampled_from((1, 1, 2, 2, 3, 5, 8, 11)))
    def fail_over(self, steps: int) -> None:
        """Another server takes over which has not got the last writes. What processes remember stays."""
        for _ in range(min(steps, len(self.past) - 1)):
            self.past.pop()
        view, self.truth = self.past.pop()
        self.ground.put_back(view)

    @invariant()
    def all_is_as_promised(self) -> None:
        self.compare()

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _new(self, session: str, route: Sequence[str], deadline: str | None) -> Turn:
        number = len(self.wanted)
        turn = Turn(id=f"{session}.t{number}", session_id=session, seed=number)
        turn.route.extend(STAGES[name].number for name in route)
        turn.caller.tenant, turn.caller.key_id = "acme", "k1"
        if deadline:
            turn.deadline.FromSeconds(1 if deadline == "past" else round(time.time()) + HOUR)
        return turn

    def _token(self, turn: str) -> int:
        found = self.truth.turns.get(turn)
        return found.token if found else 1

    def _stage(self, pick: int) -> str:
        stages = self.waiting_stages()
        return stages[pick % len(stages)]
