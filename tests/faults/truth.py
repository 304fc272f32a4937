"""The promises of docs/protocol.md as a model: what each call answers, and what lies in the journal after it.

Written from the page and not from the scripts. Where time or delivery decide (which turn a sweep finds, whether a turn
was given up), the model does not foretell but judges: `claimed`, `given_up` and `too_late` fail on what is not allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kimia.stage import DETOKENIZER, LLM, STAGES, TOKENIZER, StageKind, route_of
from kimia.streams import keys
from kimia.streams.jobs import Claim, Outcome, Published
from kimia.v1.turn_pb2 import Chunk, Encoded, InputAudio, Speech, Step, Turn

LOGS = ("input", "encoded", "tokens", "audio")
LENGTH = {"input": 3, "encoded": 2, "tokens": 3, "audio": 2}  # chunks of a whole log
EARLY = (LLM.name, DETOKENIZER.name)  # stages whose first chunk queues the next


class Violation(AssertionError):
    """A promise is broken."""


def demand(kept: bool, *promise: object) -> None:
    """Raise Violation unless a promise is kept."""
    if not kept:
        raise Violation(" ".join(str(word) for word in promise))


def made(log: str, index: int, writer: int) -> Chunk:
    """Chunk `index` of a log, as writer number `writer` makes it: a second writer's chunk would be another."""
    chunk = Chunk(index=index, final=index == LENGTH[log] - 1)
    if log == "input":
        chunk.input.CopyFrom(InputAudio(data=str(writer).encode()))
    elif log == "encoded":
        chunk.encoded.CopyFrom(Encoded(codes=[index], feature_key=f"{{0}}:blob:{writer}:{index}"))
    elif log == "tokens":
        chunk.step.CopyFrom(Step(text_id=index, text=str(writer)))
    else:
        chunk.speech.CopyFrom(Speech(pcm=str(writer).encode(), sample_rate=24000))
    return chunk


def hours_left(spec: Turn) -> float | None:
    """Hours to the deadline, as the rules set it: past, or an hour ahead."""
    if not spec.HasField("deadline"):
        return None
    return -1.0e9 if spec.deadline.seconds == 1 else 1.0


@dataclass
class StageTruth:
    """One stage of one turn."""

    queued: bool = False
    done: bool = False
    claim: int | None = None  # number of the attempt that holds it
    live: bool = False  # its lease has not ended
    tries: int = 0  # claims since the last new chunk


@dataclass
class TurnTruth:
    """One turn as it must be."""

    spec: Turn
    reader: str
    token: int
    exists: bool = True
    state: str = "open"
    reason: str = ""  # of a failure
    rewound: bool = False
    heard: int | None = None  # seconds of speech that its caller has heard
    time_left: float | None = None  # hours to the deadline
    logs: dict[str, list[bytes]] = field(default_factory=lambda: {log: [] for log in LOGS})
    stages: dict[str, StageTruth] = field(default_factory=lambda: {name: StageTruth() for name in STAGES})

    @property
    def over(self) -> bool:
        return self.state not in ("open", "running")

    @property
    def route(self) -> tuple[str, ...]:
        """Names of the stages that it passes, and of the tokenizer where it was rewound to it."""
        names = tuple(kind.name for kind in route_of(self.spec))
        return (TOKENIZER.name, *names) if self.rewound and TOKENIZER.name not in names else names

    def after(self, stage: str) -> str:
        names = [kind.name for kind in route_of(self.spec) if kind.number > STAGES[stage].number]
        return names[0] if names else ""

    def complete(self, log: str) -> bool:
        return len(self.logs[log]) == LENGTH[log]

    @property
    def finished(self) -> bool:
        """Every stage of the route has published its final chunk."""
        return all(self.stages[name].done for name in self.route)

    def end(self, state: str, reason: str = "") -> bool:
        """Set the terminal state, unless there is one or the turn is gone; whether this call did."""
        if not self.exists or self.over:
            return False
        self.state, self.reason = state, reason
        return True

    def waits_for(self, stage: str) -> bool:
        """Whether a worker of a stage would find it."""
        found = self.stages[stage]
        return self.exists and not self.over and found.queued and not found.done

    def vanish(self, logs: Sequence[str]) -> None:
        """The head and these logs are gone."""
        self.exists = False
        for log in logs:
            self.logs[log] = []

    # ---- what workers do ----

    def claimed(self, claim: Claim, number: int) -> None:
        """Judge a claim that was given out as attempt `number`."""
        stage = self.stages[claim.kind.name]
        demand(self.exists and self.state == "running", "a claim of a turn that is not running:", self.state)
        demand(stage.queued and not stage.done, "a claim of a stage that does not wait")
        demand(not (stage.claim is not None and stage.live), "two live claims of one stage")
        demand(not self.dropped_at(claim.kind), "a claim after the deadline")
        demand(claim.attempt == stage.tries + 1, "claim number", claim.attempt, "after", stage.tries)
        demand(claim.next_index == len(self.logs[claim.kind.writes]), "a claim that begins at", claim.next_index)
        demand(claim.rewound == self.rewound, "a claim that does not know of the rewind")
        demand(claim.turn == self.spec, "a claim with another spec")
        heard = claim.playback and claim.playback.heard
        demand(heard == self.heard, "a claim that thinks its caller has heard", heard, "and not", self.heard)
        stage.claim, stage.live, stage.tries = number, True, claim.attempt

    def given_up(self, stage: str, most: int) -> None:
        """Judge a turn that was given up."""
        found = self.stages[stage]
        demand(found.tries >= most, "given up after", found.tries, "claims without a chunk")
        demand(found.queued and not found.done, "given up in a stage that it does not wait in")
        demand(not (found.claim is not None and found.live), "given up while its worker lives")
        found.tries += 1
        demand(self.end("error", "GAVE_UP"), "given up after its end")

    def too_late(self, stage: str) -> None:
        """Judge a turn that was dropped because of its deadline."""
        demand(self.waits_for(stage), "dropped in a stage that it does not wait for")
        demand(self.dropped_at(STAGES[stage]), "dropped before its deadline, or after it had begun")
        demand(self.end("error", "DEADLINE_EXCEEDED"), "dropped after its end")

    def dropped_at(self, kind: StageKind) -> bool:
        """The deadline has passed, and the stage has not begun."""
        return self.time_left is not None and self.time_left < 0 and not self.logs[kind.writes]

    @property
    def is_late(self) -> bool:
        """A stage that has not begun waits for it, no worker of that stage lives, and the deadline has passed."""
        return any(
            self.waits_for(name) and self.dropped_at(STAGES[name]) and not (found.claim is not None and found.live)
            for name, found in self.stages.items()
        )

    def held(self, stage: str, number: int) -> bool:
        """Attempt `number` is the one that may write."""
        return self.exists and self.stages[stage].claim == number

    def publish(self, kind: StageKind, number: int, chunk: Chunk) -> Published:
        """What publishing must answer."""
        if not self.exists:
            return Published(Outcome.GONE, 0)
        log, stage = self.logs[kind.writes], self.stages[kind.name]
        if stage.claim != number:
            return Published(Outcome.FENCED, len(log))
        if self.over:
            known = self.state == "done" and chunk.index < len(log)
            return Published(Outcome.DUPLICATE if known else Outcome.CANCELLED, len(log))
        if chunk.index > len(log):
            return Published(Outcome.GAP, len(log))
        new = chunk.index == len(log)
        if new:
            log.append(chunk.SerializeToString())
            stage.tries = 0
        self._follow_up(kind, chunk.final)
        return Published(Outcome.WRITTEN if new else Outcome.DUPLICATE, len(log))

    def _follow_up(self, kind: StageKind, final: bool) -> None:
        after = self.after(kind.name)
        if after and (final or kind.name in EARLY):
            self.stages[after].queued = True
        if final:
            self.stages[kind.name].done = True
        if final and self.finished:
            self.end("done")

    def heartbeat(self, stage: str, number: int) -> bool:
        """Whether the claim lives on."""
        if not self.held(stage, number) or self.over:
            return False
        self.stages[stage].live = True
        return True

    def release(self, stage: str, number: int) -> None:
        found = self.stages[stage]
        if self.held(stage, number) and not self.over and not found.done:
            found.claim, found.live, found.tries = None, False, max(found.tries - 1, 0)

    def rewind(self, number: int) -> None:
        if not self.held(LLM.name, number) or self.over or self.stages[LLM.name].done:
            return
        for name in (TOKENIZER.name, LLM.name):
            self.stages[name] = StageTruth(tries=self.stages[name].tries)
        self.stages[TOKENIZER.name].queued = True
        self.rewound = True

    # ---- what orchestrators do ----

    def append(self, token: int, chunks: Sequence[Chunk]) -> str:
        """`ok`, or why not."""
        log = self.logs["input"]
        if not self.exists:
            return "gone"
        if token != self.token:
            return "fenced"
        if self.over:
            return self.state
        if chunks[0].index > len(log):
            return "gap"
        log += [chunk.SerializeToString() for chunk in chunks[len(log) - chunks[0].index :]]
        return "ok"

    def submit(self, token: int, spec: Turn) -> str:
        """`ok`, or why not."""
        if not self.exists:
            return "gone"
        if token != self.token:
            return "fenced"
        if self.over:
            return self.state
        if self.state == "open":
            self.state, self.spec = "running", spec
            self.time_left = hours_left(spec)
            self.stages[route_of(spec)[0].name].queued = True
        return "ok"

    def hear(self, seconds: int) -> None:
        """The caller has heard so much; the furthest word of a turn that runs counts."""
        if self.exists and self.state == "running":
            self.heard = max(seconds, self.heard or 0)


@dataclass
class Truth:
    """Everything that must lie in the journal."""

    turns: dict[str, TurnTruth] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)  # idempotency key -> turn
    members: dict[str, set[str]] = field(default_factory=dict)  # session -> its turns
    sessions: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # version and record
    deleted: set[str] = field(default_factory=set)  # sessions
    letters: int = 0  # turns given up

    def living(self, turn: str) -> TurnTruth | None:
        found = self.turns.get(turn)
        return found if found and found.exists else None

    def open(self, spec: Turn, reader: str, token: int) -> None:
        """A new turn; input that outlived an expired one of the same id is still there."""
        before, found = self.turns.get(spec.id), TurnTruth(spec, reader, token)
        if before:
            found.logs["input"] = before.logs["input"]
        self.turns[spec.id] = found
        self.members.setdefault(keys.session_of(spec.id), set()).add(spec.id)
        if spec.idempotency_key:
            self.requests[spec.idempotency_key] = spec.id

    def delete(self, session: str) -> bool:
        """Whether there was anything to delete."""
        turns = self.members.pop(session, set())
        if session not in self.sessions and not turns:
            return False
        self.sessions.pop(session, None)
        self.deleted.add(session)
        for turn in turns:
            self.turns[turn].vanish(LOGS)
        return True
