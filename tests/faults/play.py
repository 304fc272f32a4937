"""What the rules of the state machine are made of: calls of the system, judged by the model, and what must hold."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis.stateful import MultipleResults, RuleBasedStateMachine, multiple

from kimia.errors import KimiaError, NotFoundError, StateError, TurnCancelledError
from kimia.stage import DETOKENIZER, STAGES, TOKENIZER, StageKind
from kimia.streams import keys
from kimia.streams.jobs import Claim, Jobs, Outcome
from kimia.streams.journal import Journal
from kimia.v1.turn_pb2 import Chunk, Failure, Turn
from tests.faults.ground import HOUR, OPTIONS, Ground, P, View
from tests.faults.truth import LENGTH, LOGS, Truth, TurnTruth, Violation, demand, made

READERS = ("o1", "o2")
SESSIONS = ("s1", "s2")
REMEMBERED = 12  # steps that a fail-over may take back
ROUNDS = 12  # in which everything must end
LIFE = round(1000 * (OPTIONS.turn_ttl + OPTIONS.session_ttl + HOUR))  # ms: no key lives longer,
LETTERS = 7 * 24 * HOUR * 1000  # ms: but for dead letters


@dataclass(eq=False)
class Attempt:
    """What one claim's worker remembers: all chunks that it makes, and which one it sends next."""

    number: int
    jobs: Jobs
    claim: Claim
    chunks: list[Chunk]
    at: int
    heard_all: bool = False  # it has read the log before its own to the end

    @property
    def kind(self) -> StageKind:
        return self.claim.kind

    @property
    def turn(self) -> str:
        return self.claim.turn.id

    def __repr__(self) -> str:
        return f"attempt {self.number} ({self.claim.consumer}, token {self.claim.token})"


@dataclass(eq=False)
class Delivery:
    """Entries that were delivered to a worker which has not claimed them yet."""

    jobs: Jobs
    stage: str
    streams: list[str]
    answer: list[Any]

    def entries(self) -> list[tuple[str, str]]:
        pairs = zip(self.streams, self.answer, strict=True)
        return [(stream, entry.decode()) for stream, (_, found) in pairs for entry, _ in found]


class Play(RuleBasedStateMachine):
    """Orchestrators and workers on a server, and the model beside them. `ground` is set by whoever runs it."""

    ground: ClassVar[Ground]

    def __init__(self) -> None:
        super().__init__()
        self.wire = self.ground.wire()
        self.journal = Journal(self.wire)
        self.workers = {
            (stage, number): Jobs(self.wire, STAGES[stage], f"{stage}-{number}")
            for stage in STAGES
            for number in (1, 2)
        }
        for stage in STAGES:
            self.restart((stage, 1))
        self.truth = Truth()
        self.view = self.ground.look()
        self.past: deque[tuple[View, Truth]] = deque(maxlen=REMEMBERED)
        self.held: dict[int, Attempt] = {}
        self.numbers = 0  # of writers
        self.wanted: dict[str, Turn] = {}  # what the orchestrators remember
        self.tokens: set[int] = set()  # all that were ever given out, whatever a fail-over took back
        self.sound = True  # no promise was broken so far

    def restart(self, worker: tuple[str, int]) -> None:
        """A new process under the old name."""
        stage, number = worker
        self.workers[worker] = Jobs(self.wire, STAGES[stage], f"{stage}-{number}")
        self.ground.run(self.workers[worker].prepare())

    def waiting_stages(self) -> list[str]:
        """Stages that a turn waits for; all of them where none does."""
        found = [name for name in STAGES if any(turn.waits_for(name) for turn in self.truth.turns.values())]
        return found or list(STAGES)

    def turn_of(self, attempt: Attempt) -> TurnTruth:
        """An attempt's turn; where a fail-over took it back altogether, one that is gone."""
        nothing = TurnTruth(attempt.claim.turn, "", 0, exists=False)
        return self.truth.turns.get(attempt.turn, nothing)

    def number(self) -> int:
        """Of a new writer."""
        self.numbers += 1
        return self.numbers

    def _fresh(self, token: int) -> int:
        """A token that nobody has had."""
        demand(token not in self.tokens, "a token given twice:", token)
        self.tokens.add(token)
        return token

    def answer(self, call: Any) -> Any:
        """What a call gives, or the kind of error that it raises."""
        try:
            return self.ground.run(call)
        except KimiaError as error:
            return type(error)

    # ---- orchestrators --------------------------------------------------------------------------------------------

    def open_turn(self, spec: Turn, reader: str) -> None:
        """Open a turn, or find the one that is there."""
        opened = self.answer(self.journal.open_turn(spec, reader))
        if keys.session_of(spec.id) in self.truth.deleted:
            demand(opened is NotFoundError, "opened in a deleted session")
            return
        known = [self.truth.requests.get(spec.idempotency_key, ""), spec.id]
        old = next((turn for turn in known if self.truth.living(turn)), None)
        if old:
            found = self.truth.turns[old]
            token = found.token if found.reader == reader else 0
            demand((opened.turn_id, opened.token, opened.existing) == (old, token, True), "another turn than before")
            return
        demand((opened.turn_id, opened.existing) == (spec.id, False), "found a turn that is not there")
        self.truth.open(spec, reader, self._fresh(opened.token))

    def append(self, turn: str, token: int, start: int, count: int) -> None:
        """Append input; every time as another writer, so that it shows whose chunk it became."""
        writer = self.number()
        chunks = [made("input", start + n, writer) for n in range(count)]
        found = self.truth.turns.get(turn)
        wanted = found.append(token, chunks) if found else "gone"
        answer = self.answer(self.journal.append_input(turn, token, chunks))
        after = len(found.logs["input"]) if found and wanted == "ok" else _error(wanted)
        demand(answer == after, "append answered", answer, "and not", after)

    def submit_turn(self, turn: str, token: int, worker: str | None) -> None:
        """Submit a final spec, which is another than the one that it was opened with."""
        spec = Turn.FromString(self.wanted[turn].SerializeToString())
        spec.seed += 1000
        found = self.truth.turns.get(turn)
        wanted = found.submit(token, spec) if found else "gone"
        answer = self.answer(self.journal.submit(spec, token, worker))
        demand(answer == (None if wanted == "ok" else _error(wanted)), "submit answered", answer, "and not", wanted)

    def take_over_reading(self, turn: str, reader: str) -> None:
        """Another connection reads the turn on."""
        token = self.answer(self.journal.take_reader(turn, reader))
        found = self.truth.living(turn)
        if not found:
            demand(token is NotFoundError, "read a turn that is gone")
            return
        found.reader, found.token = reader, self._fresh(token)

    def see_to(self, turn: str) -> None:
        """An orchestrator makes sure of a turn that it has begun: opens, tells and submits what is lost of it."""
        found = self.truth.turns.get(turn)
        if found and (found.over or not found.exists):
            return
        self.open_turn(self.wanted[turn], READERS[0])
        found = self.truth.living(turn)
        if not found or found.state != "open":
            return
        if found.reader != READERS[0]:
            self.take_over_reading(turn, READERS[0])
        start = len(found.logs["input"])
        if start < LENGTH["input"]:
            self.append(turn, found.token, start, LENGTH["input"] - start)
        self.submit_turn(turn, found.token, None if found.spec.seed % 2 else "llm-1")

    # ---- workers --------------------------------------------------------------------------------------------------

    def taken(self, stage: str, jobs: Jobs, claims: Sequence[Claim], lost: bool = False) -> MultipleResults[Attempt]:
        """Judge what a sweep gave, and what it ended on the way. Claims whose answer was lost are nobody's."""
        self.view = self.ground.look()
        for turn, found in self.truth.turns.items():
            head = self.view.hash(keys.head(P, turn))
            if found.exists and not found.over and head.get("state") == b"error":
                if Failure.FromString(head["failure"]).reason == "GAVE_UP":
                    found.given_up(stage, OPTIONS.max_deliveries)
                    self.truth.letters += 1
                else:
                    found.too_late(stage)
        attempts = [self._begun(jobs, claim) for claim in claims]
        return multiple(*(() if lost else attempts))

    def _begun(self, jobs: Jobs, claim: Claim) -> Attempt:
        number, log = self.number(), claim.kind.writes
        found = self.truth.living(claim.turn.id)
        if not found:
            raise Violation("a claim of a turn that is gone")
        found.claimed(claim, number)
        self._fresh(claim.token)
        anew = claim.kind is TOKENIZER and claim.rewound
        before = [] if anew else [Chunk.FromString(data) for data in found.logs[log]]
        rest = [made(log, index, number) for index in range(len(before), LENGTH[log])]
        chunks = [*before, *rest]
        self.held[number] = Attempt(number, jobs, claim, chunks, min(len(before), len(chunks) - 1))
        return self.held[number]

    def publish_chunks(self, attempt: Attempt, indices: Sequence[int]) -> None:
        """Publish chunks in one round trip. The detokenizer's last one needs the whole log `tokens`."""
        found, kind = self.turn_of(attempt), attempt.kind
        attempt.heard_all |= kind is not DETOKENIZER or (found.exists and found.complete(kind.reads))
        last = len(attempt.chunks) - (0 if attempt.heard_all else 1)
        chunks = [attempt.chunks[index] for index in indices if index < last]
        if not chunks:
            return
        answers = self.ground.run(attempt.jobs.publish_all([(attempt.claim, chunk) for chunk in chunks]))
        for chunk, answer in zip(chunks, answers, strict=True):
            wanted = found.publish(kind, attempt.number, chunk)
            demand(answer == wanted, attempt, "published", chunk.index, "and got", answer, "instead of", wanted)
            if answer.outcome is Outcome.GAP:
                attempt.at = answer.next
            elif not answer.outcome.lost:
                attempt.at = chunk.index + 1

    def beat(self, attempt: Attempt) -> None:
        """A heartbeat."""
        lives = self.turn_of(attempt).heartbeat(attempt.kind.name, attempt.number)
        lost = self.ground.run(attempt.jobs.heartbeat([attempt.claim]))
        demand(lost == ([] if lives else [attempt.claim]), attempt, "lives" if lives else "is lost", "and heard else")

    def fall_silent(self, turn: str, stage: str, entry: bool = True, lease: bool = True) -> None:
        """The worker of a turn's stage gives no sign of life: its entry is old, and its lease has ended."""
        head = self.view.hash(keys.head(P, turn))
        if lease and f"{stage}:lease" in head:
            self.ground.end_lease(turn, stage)
            self.truth.turns[turn].stages[stage].live = False
        if entry and f"{stage}:entry" in head:
            place = head[f"{stage}:stream"].decode(), head[f"{stage}:entry"].decode()
            holder = self.view.holder(*place)
            if holder:
                self.ground.age_entry(*place, holder)

    def all_silent(self) -> None:
        """No worker gives a sign of life."""
        self.ground.age()
        for found in self.truth.turns.values():
            for stage in found.stages.values():
                stage.live = False

    # ---- what must hold after every step ----------------------------------------------------------------------------

    def compare(self) -> None:
        """The whole server with the whole model."""
        self.sound = False
        self.view = self.ground.look()
        for turn, found in self.truth.turns.items():
            self._compare_logs(turn, found)
            head = self.view.hash(keys.head(P, turn))
            demand(bool(head) == found.exists, turn, "is there" if head else "is not there")
            if head:
                self._compare_head(turn, found, head)
        for session in SESSIONS:
            self._compare_session(session)
        for name, key in self.view.items():
            longest = LETTERS if name.startswith(f"{P}:dlq:") else LIFE
            demand(_permanent(name) or 0 <= key.ttl <= longest, name, "lives for", key.ttl, "ms")
        letters = sum(len(self.view.entries(keys.dlq(P, stage))) for stage in STAGES)
        demand(letters == self.truth.letters, letters, "dead letters of", self.truth.letters, "turns given up")
        self.past.append((self.view, copy.deepcopy(self.truth)))
        self.sound = True

    def _compare_logs(self, turn: str, found: TurnTruth) -> None:
        head = self.view.hash(keys.head(P, turn))
        for log in LOGS:
            entries = self.view.entries(keys.log(P, turn, log))
            demand([fields["c"] for _, fields in entries] == found.logs[log], "log", log, "of", turn, "is otherwise")
            wanted = [f"{index + 1}-0" for index in range(len(entries))]
            demand([entry for entry, _ in entries] == wanted, "log", log, "of", turn, "has gaps")
            demand(not head or int(head.get(f"{log}:next", 0)) == len(entries), "next of", log, "is wrong")

    def _compare_head(self, turn: str, found: TurnTruth, head: dict[str, bytes]) -> None:
        state, reason = head["state"].decode(), Failure.FromString(head.get("failure", b"")).reason
        demand((state, reason) == (found.state, found.reason), turn, "is", state, reason, "and not", found.state)
        reader = head["reader"].decode(), int(head["reader_token"])
        demand(reader == (found.reader, found.token), turn, "has another reader")
        heard = int(head["heard"]) / 1000 if "heard" in head else None
        demand(heard == found.heard, turn, "was heard for", heard, "and not", found.heard)
        whole = all(found.complete(STAGES[name].writes) for name in found.route)
        demand(state != "done" or whole, turn, "is done, and not all is there")
        for name, stage in found.stages.items():
            owner = self.held.get(stage.claim or 0)
            fence = (owner.claim.consumer.encode(), b"%d" % owner.claim.token) if owner else (None, None)
            there = (head.get(f"{name}:consumer"), head.get(f"{name}:token"))
            demand(there == fence, name, "of", turn, "belongs to", there, "and not", fence)
            demand(int(head.get(f"{name}:tries", 0)) == stage.tries, "tries of", name, "of", turn, "are wrong")
            demand((f"{name}:queued" in head) == stage.queued, name, "of", turn, "queued wrongly")
            demand((f"{name}:done" in head) == stage.done, name, "of", turn, "done wrongly")

    def _compare_session(self, session: str) -> None:
        record = self.view.hash(keys.session(P, session))
        there = (int(record["version"]), record["record"]) if record else None
        demand(there == self.truth.sessions.get(session), "session", session, "is otherwise")
        named = keys.session_turns(P, session) in self.view
        demand(named == bool(self.truth.members.get(session)), "turns of session", session)
        names = self.view[keys.session_turns(P, session)].value if named else []
        lost = [turn for turn in self._turns_there(session) if turn.encode() not in names]
        demand(not lost, lost, "would be left when the session is deleted")
        if session in self.truth.deleted:
            left = [name for name in self.view if name.startswith((f"{P}:turn:{session}.", f"{P}:session:{session}"))]
            demand(not left, left, "came back after deletion")

    def _turns_there(self, session: str) -> set[str]:
        """Turns of a session of which anything is left."""
        start = keys.head(P, f"{session}.")
        return {name.removeprefix(f"{P}:turn:").partition(":")[0] for name in self.view if name.startswith(start)}

    # ---- the end: everything that was begun converges -------------------------------------------------------------

    def teardown(self) -> None:
        if self.sound:
            self.converge()

    def converge(self) -> None:
        """Orchestrators see to their turns, fresh workers do what waits; then nothing is left to do."""
        for turn in self.wanted:
            self.see_to(turn)
        for stage in STAGES:
            self.restart((stage, 1))
        for _ in range(ROUNDS):
            over = all(found.over or not found.exists for found in self.truth.turns.values())
            self.all_silent()
            for stage in STAGES:
                self._work(stage)
            if over:
                break
        self.compare()
        for turn, found in self.truth.turns.items():
            demand(found.over or not found.exists, turn, "never ends: it is", found.state)
        for stream in self.view.job_streams():
            demand(not self.view[stream].holders, stream, "still has", self.view[stream].holders)
            demand(len(self.view.entries(stream)) <= 1, stream, "is not trimmed")
        for stage in STAGES:
            demand(self.ground.run(self.workers[stage, 1].depth()) == (0, 0), stage, "has work left")

    def _work(self, stage: str) -> None:
        jobs = self.workers[stage, 1]
        found = [self.taken(stage, jobs, self.ground.run(take(20))).values for take in (jobs.recover, jobs.sweep)]
        for attempt in (attempt for attempts in found for attempt in attempts):
            while attempt.at < len(attempt.chunks):
                before = attempt.at
                self.publish_chunks(attempt, range(before, len(attempt.chunks)))
                if attempt.at == before:
                    break


def _permanent(name: str) -> bool:
    """Keys that may live for ever: job streams of the stages, and counters."""
    return name.startswith(f"{P}:token:") or (name.startswith(f"{P}:jobs:") and ":@" not in name)


def _error(answer: str) -> type[KimiaError]:
    return {"gone": NotFoundError, "cancelled": TurnCancelledError}.get(answer, StateError)
