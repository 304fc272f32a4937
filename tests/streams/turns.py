"""Small turns, chunks and a whole wire for the tests of the journal and the jobs."""

from kimia.stage import DETOKENIZER, LLM, STAGES, TOKENIZER, StageKind
from kimia.streams import keys
from kimia.streams.jobs import Claim, Jobs
from kimia.streams.journal import Journal
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.turn_pb2 import Caller, Chunk, Encoded, InputAudio, Speech, Step, Turn

SPEECH = ("tokenizer", "llm", "detokenizer")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# Leases end when a test says so, and not because a machine is slow; no turn is left to the worker that it would like.
PATIENT = WireOptions(lease=600, prefix_patience=0)


def new_turn(session: str = "s1", route=("llm",), **fields) -> Turn:
    turn = Turn(id=keys.new_turn_id(session), session_id=session, seed=7, route=[STAGES[n].number for n in route])
    turn.caller.CopyFrom(Caller(tenant="acme", key_id="k1", traceparent=TRACE))
    for name, value in fields.items():
        setattr(turn, name, value)
    return turn


def sound(index: int, final: bool = False) -> Chunk:
    return Chunk(index=index, final=final, input=InputAudio(clip=0, data=b"\1\2", clip_end=final))


def encoded(index: int, final: bool = False, key: str = "") -> Chunk:
    return Chunk(index=index, final=final, encoded=Encoded(clip=0, codes=[index], feature_key=key))


def step(index: int, final: bool = False, text: str = "") -> Chunk:
    return Chunk(index=index, final=final, step=Step(text_id=index, code=index, text=text))


def speech(index: int, final: bool = False) -> Chunk:
    return Chunk(index=index, final=final, speech=Speech(pcm=b"\0\0", sample_rate=24000))


class World:
    """A journal and the workers of all stages, each of which may be started again under another name."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.journal = Journal(wire)
        self.redis = wire.journal

    async def worker(self, kind: StageKind = LLM, name: str = "w1") -> Jobs:
        jobs = Jobs(self.wire, kind, name)
        await jobs.prepare()
        return jobs

    async def submitted(self, turn: Turn | None = None, worker: str | None = None) -> Turn:
        turn = turn or new_turn()
        opened = await self.journal.open_turn(turn, "orchestrator")
        await self.journal.submit(turn, opened.token, worker)
        return turn

    async def claimed(self, jobs: Jobs, turn: Turn | None = None) -> Claim:
        await self.submitted(turn)
        [claim] = await jobs.sweep(1)
        return claim

    async def silence(self, *claims: Claim) -> None:
        """Let the leases of claims end, as if their worker had given no sign of life for an hour."""
        for claim in claims:
            await self.end_lease(claim.turn, claim.kind.name)
            name, entry = claim.job_key, claim.job_id
            await self.redis.xclaim(name, keys.GROUP, claim.consumer, 0, [entry], idle=3_600_000, justid=True)

    async def end_lease(self, turn: Turn, stage: str) -> None:
        """Let a lease end, whatever becomes of its entry."""
        await self.redis.hset(keys.head("{0}", turn.id), f"{stage}:lease", 1)

    async def taken_over(self, claim: Claim, worker: Jobs) -> Claim:
        """The turn of a claim that fell silent, in the hands of another worker."""
        await self.silence(claim)
        [new] = await worker.recover(1)
        return new

    async def speaking(self, turn: Turn | None = None) -> tuple[dict[str, Jobs], dict[str, Claim]]:
        """Workers and claims of a turn with speech of which every stage has published its first chunk."""
        jobs = {kind.name: await self.worker(kind, f"{kind.name}-1") for kind in (TOKENIZER, LLM, DETOKENIZER)}
        claims = {"tokenizer": await self.claimed(jobs["tokenizer"], turn or new_turn(route=SPEECH))}
        await jobs["tokenizer"].publish(claims["tokenizer"], encoded(0, final=True))
        [claims["llm"]] = await jobs["llm"].sweep(1)
        await jobs["llm"].publish(claims["llm"], step(0))
        [claims["detokenizer"]] = await jobs["detokenizer"].sweep(1)
        await jobs["detokenizer"].publish(claims["detokenizer"], speech(0))
        return jobs, claims

    async def holder(self, claim: Claim) -> str | None:
        """The consumer that has a job's entry pending; None where nobody has."""
        [entry] = await self.redis.xpending_range(claim.job_key, keys.GROUP, claim.job_id, claim.job_id, 1) or [None]
        return entry and entry["consumer"].decode()

    async def state(self, turn: Turn) -> str:
        return (await self.journal.head(turn.id)).state

    async def pointers(self, owner: str, p: str = "{0}") -> list[tuple[str, str, int]]:
        """(turn, log, next) of an inbox."""
        entries = await self.redis.xrange(keys.inbox(p, owner))
        return [(f[b"t"].decode(), f[b"l"].decode(), int(f[b"n"])) for _, f in entries]

    async def names(self) -> set[str]:
        """Every key there is."""
        return {key.decode() async for key in self.redis.scan_iter(count=1000)}

    async def permanent(self) -> set[str]:
        """Keys that do not expire."""
        return {name for name in await self.names() if await self.redis.ttl(name) < 0}
