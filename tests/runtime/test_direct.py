"""Stages served to clients of one stage: real gRPC over a socket, stages without a model."""

import asyncio
import time

import grpc
import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from kimia.errors import (
    CapacityError,
    ContextLengthError,
    DeadlineError,
    RequestError,
    UnavailableError,
)
from kimia.model.philox import SEED_LIMIT
from kimia.runtime.direct import Direct, register
from kimia.runtime.fake import FakeDetokenizer, FakeLanguageModel, FakeTokenizer, read_pcm
from kimia.runtime.metrics import REFUSED, TURNS
from kimia.runtime.rows import Rows
from kimia.runtime.server import bind, build_server
from kimia.runtime.settings import Settings
from kimia.stage import DETOKENIZER, LLM, TOKENIZER
from kimia.status import from_rpc_error
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message, Text
from kimia.v1.stages_pb2 import EncodeRequest, LanguageModelGenerateRequest, SynthesizeRequest
from kimia.v1.stages_pb2_grpc import DetokenizerStub, LanguageModelStub, TokenizerStub
from kimia.v1.turn_pb2 import Caller, Chunk, Encoded, InputAudio, Speech, StageReport, Step, Turn

pytestmark = pytest.mark.unit

SETTINGS = Settings(listen="127.0.0.1:0")
STUBS = {TOKENIZER: TokenizerStub, LLM: LanguageModelStub, DETOKENIZER: DetokenizerStub}
METHODS = {TOKENIZER: "Encode", LLM: "Generate", DETOKENIZER: "Synthesize"}
REQUESTS = {TOKENIZER: EncodeRequest, LLM: LanguageModelGenerateRequest, DETOKENIZER: SynthesizeRequest}


class Probe:
    """A stage that shows what it was given, gives one chunk per chunk, and can be held."""

    def __init__(self, kind=DETOKENIZER, error=None, held=False):
        self.kind, self.error, self.held = kind, error, held
        self.turns = []
        self.started, self.closed = asyncio.Event(), asyncio.Event()

    async def warm_up(self):
        pass

    async def run(self, turn, inbox, published=()):
        self.turns.append(turn)
        self.started.set()
        try:
            index = 0
            async for _ in inbox:
                yield Chunk(index=index, speech=Speech(pcm=b"12"))
                index += 1
            if self.error:
                raise self.error
            if self.held:
                await asyncio.Event().wait()
            yield Chunk(index=index, final=True, report=StageReport(units=index))
        finally:
            self.closed.set()


class Book:
    """A ledger that says yes, or no."""

    def __init__(self, error=None):
        self.error = error
        self.entries = []
        self.released = asyncio.Event()

    async def reserve(self, session, tenant, route, seconds, tenant_limit=None):
        if self.error:
            raise self.error
        self.entries.append((session, tenant, list(route), tenant_limit))

    async def renew(self, session, seconds):
        return True

    async def release(self, session):
        self.entries.append(("released", session))
        self.released.set()


class Serving:
    """A direct stage on a socket, and a client of it."""

    def __init__(self, stage, *, rows=2, ledger=None, settings=SETTINGS, opened=True):
        self.kind, self.rows, self.settings = stage.kind, Rows(rows), settings
        self.direct = Direct(stage.kind, self.rows, settings)
        if opened:
            self.direct.open(stage, ledger)

    async def __aenter__(self):
        self.server = build_server(self.settings)
        self.name = register(self.direct, self.server)
        address = bind(self.server, self.settings)
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(address)
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        await self.server.stop(None)

    def call(self, *items, timeout=None):
        """A call that sends the turn and chunks and then no more."""
        method = getattr(STUBS[self.kind](self.channel), METHODS[self.kind])
        return method(iter(self.request(item) for item in items), timeout=timeout)

    def open_call(self, timeout=None):
        """A call that goes on being written to."""
        return getattr(STUBS[self.kind](self.channel), METHODS[self.kind])(timeout=timeout)

    def request(self, item):
        kind = REQUESTS[self.kind]
        return kind(turn=item) if isinstance(item, Turn) else kind(chunk=item) if isinstance(item, Chunk) else item

    async def collect(self, *items, timeout=None):
        return [response.chunk async for response in self.call(*items, timeout=timeout)]

    async def refused(self, *items, timeout=None):
        with pytest.raises(grpc.RpcError) as caught:
            await self.collect(*items, timeout=timeout)
        return from_rpc_error(caught.value)


def steps(*codes, index=0):
    """Step chunks with these codes, the last one final."""
    last = len(codes) - 1
    return [Chunk(index=index + i, step=Step(code=code), final=i == last) for i, code in enumerate(codes)]


async def rest(call):
    """What is still to be read of a call."""
    chunks = []
    while (response := await call.read()) is not grpc.aio.EOF:
        chunks.append(response.chunk)
    return chunks


def count(outcome, stage="detokenizer"):
    return TURNS.labels(stage=stage, outcome=outcome)._value.get()


# ---- the three services -----------------------------------------------------------------------------------------


async def test_sound_is_encoded():
    clip = Clip(format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000), number=3)
    turn = Turn(messages=[Message(role=ROLE_USER, audio=clip)])
    sound = Chunk(final=True, input=InputAudio(clip=3, data=bytes(2560 * 20), clip_end=True))
    async with Serving(FakeTokenizer()) as serving:
        assert serving.name == "kimia.v1.Tokenizer"
        chunks = await serving.collect(turn, sound)
    assert [len(chunk.encoded.codes) for chunk in chunks] == [12, 8]
    assert chunks[-1].final
    assert all(chunk.encoded.features for chunk in chunks)


async def test_a_conversation_in_text_is_answered_without_any_chunk():
    turn = Turn(messages=[Message(role=ROLE_USER, text=Text(text="hello"))], seed=7)
    async with Serving(FakeLanguageModel()) as serving:
        assert serving.name == "kimia.v1.LanguageModel"
        first, second = [await serving.collect(turn) for _ in range(2)]
    assert first == second
    assert [chunk.index for chunk in first] == list(range(len(first)))
    assert first[-1].report.units == len(first)


async def test_codes_become_speech():
    async with Serving(FakeDetokenizer()) as serving:
        assert serving.name == "kimia.v1.Detokenizer"
        chunks = await serving.collect(Turn(), *steps(*range(20)))
    assert read_pcm(b"".join(chunk.speech.pcm for chunk in chunks)) == [(i, i) for i in range(20)]


async def test_clients_get_no_mels():
    async with Serving(FakeDetokenizer()) as serving:
        chunks = await serving.collect(Turn(), *steps(*range(20)))
    assert len(chunks) > 1
    assert not any(chunk.speech.mel or chunk.speech.mel_key for chunk in chunks)


async def test_speech_comes_back_while_codes_are_still_sent():
    async with Serving(FakeDetokenizer()) as serving:
        call = serving.open_call()
        await call.write(serving.request(Turn()))
        for chunk in steps(*range(10)):
            chunk.final = False
            await call.write(serving.request(chunk))
        assert (await call.read()).chunk.speech.pcm
        await call.write(serving.request(steps(99, index=10)[0]))
        await call.done_writing()
        assert (await rest(call))[-1].final


# ---- what is left out -------------------------------------------------------------------------------------------


async def test_what_the_client_leaves_out_is_filled_in():
    stage = Probe()
    async with Serving(stage) as serving:
        await serving.collect(Turn(), *steps(1))
        await serving.collect(Turn(), *steps(1))
    first, second = stage.turns
    assert (first.id[:7], first.session_id) == ("direct-", "")
    assert first.caller.tenant == "default"
    assert list(first.route) == [DETOKENIZER.number]
    assert 0 < first.seed < SEED_LIMIT
    assert (first.seed, first.id) != (second.seed, second.id)
    now = time.time()
    assert now < first.deadline.ToNanoseconds() / 1e9 < now + SETTINGS.turn_deadline_seconds + 1


async def test_what_the_client_gives_is_kept():
    stage = Probe()
    given = Turn(id="mine.1", session_id="mine", seed=5)
    given.caller.tenant = "acme"
    async with Serving(stage) as serving:
        await serving.collect(given, *steps(1))
        given.options.seed = 0
        await serving.collect(given, *steps(1), timeout=20)
    first, second = stage.turns
    assert (first.id, first.session_id, first.seed, first.caller.tenant) == ("mine.1", "mine", 5, "acme")
    assert second.seed == 0
    assert second.deadline.ToNanoseconds() / 1e9 < time.time() + 21


async def test_a_seed_of_the_options_is_the_turns_seed():
    stage = Probe()
    turn = Turn(seed=1)
    turn.options.seed = 9
    async with Serving(stage) as serving:
        await serving.collect(turn, *steps(1))
    assert stage.turns[0].seed == 9


# ---- what is refused --------------------------------------------------------------------------------------------

ORDER = [
    ([], "turn"),
    ([SynthesizeRequest()], "turn"),
    ([steps(1)[0]], "turn"),
    ([Turn(seed=SEED_LIMIT)], "turn.seed"),
    ([Turn(id="x" * 200)], "turn.id"),
    ([Turn(session_id="a:b")], "turn.session_id"),
    ([Turn(caller=Caller(tenant="{x}"))], "turn.caller.tenant"),
    ([Turn(deadline=Timestamp(seconds=2**62, nanos=-5))], "turn.deadline"),
    ([Turn()], "chunk.final"),
    ([Turn(), Turn()], "chunk"),
    ([Turn(), SynthesizeRequest()], "chunk"),
    ([Turn(), Chunk(encoded=Encoded(), final=True)], "chunk.payload"),
    ([Turn(), Chunk(final=True)], "chunk.payload"),
    ([Turn(), *steps(1, index=1)], "chunk.index"),
    ([Turn(), Chunk(step=Step()), Chunk(step=Step())], "chunk.index"),
    ([Turn(), Chunk(step=Step())], "chunk.final"),
    ([Turn(), *steps(1), *steps(2, index=1)], "chunk"),
]


@pytest.mark.parametrize(("items", "field"), ORDER)
async def test_order_and_kind_are_checked(items, field):
    async with Serving(Probe()) as serving:
        error = await serving.refused(*items)
        assert (type(error), error.field) == (RequestError, field)
        assert serving.rows.free == 2


async def test_clips_and_turns_have_a_largest_size():
    piece = [Chunk(index=i, input=InputAudio(clip=i % 2, data=bytes(600)), final=i == 9) for i in range(10)]
    small = Settings(listen="127.0.0.1:0", max_clip_bytes=1500)
    async with Serving(Probe(TOKENIZER), settings=small) as serving:
        error = await serving.refused(Turn(), *piece)
        assert (type(error), error.field) == (RequestError, "chunk.input")
    small = Settings(listen="127.0.0.1:0", max_turn_bytes=1500)
    async with Serving(Probe(TOKENIZER), settings=small) as serving:
        error = await serving.refused(Turn(), *piece)
        assert (type(error), error.field) == (RequestError, "chunk")
    async with Serving(Probe(TOKENIZER)) as serving:
        assert len(await serving.collect(Turn(), *piece)) == 11


async def test_errors_of_the_stage_reach_the_client():
    async with Serving(Probe(error=ContextLengthError("shorten it", 4))) as serving:
        before = count("error")
        error = await serving.refused(Turn(), *steps(1))
        assert (type(error), error.index) == (ContextLengthError, 4)
        assert serving.rows.free == 2
        assert count("error") == before + 1


async def test_nothing_is_served_before_the_start_and_after_the_end():
    stage = Probe()
    async with Serving(stage, opened=False) as serving:
        assert type(await serving.refused(Turn(), *steps(1))) is UnavailableError
        serving.direct.open(stage)
        assert await serving.collect(Turn(), *steps(1))
        serving.direct.close()
        error = await serving.refused(Turn(), *steps(1))
        assert (type(error), error.retry_after) == (UnavailableError, 1.0)


# ---- rows, ledger, deadline, vanishing --------------------------------------------------------------------------


async def test_without_a_free_row_a_turn_is_refused_with_a_delay():
    stage = Probe(held=True)
    async with Serving(stage, rows=1) as serving:
        first = serving.call(Turn(), *steps(1))
        await stage.started.wait()
        before = REFUSED.labels(stage="detokenizer")._value.get()
        error = await serving.refused(Turn(), *steps(1))
        assert (type(error), error.retry_after) == (CapacityError, 1.0)
        assert REFUSED.labels(stage="detokenizer")._value.get() == before + 1
        first.cancel()


@pytest.mark.parametrize("length", [1, 3, 50])
async def test_a_client_that_is_still_sending_learns_why_it_was_refused(length):
    async with Serving(Probe(), rows=1) as serving:
        await serving.rows.acquire()
        errors = [type(await serving.refused(Turn(), *steps(*range(length)))) for _ in range(10)]
        assert errors == [CapacityError] * 10


async def test_the_ledger_is_asked_and_told():
    book = Book()
    settings = Settings(listen="127.0.0.1:0", tenant_sessions=3)
    async with Serving(Probe(), ledger=book, settings=settings) as serving:
        await serving.collect(Turn(session_id="call", id="call.1"), *steps(1))
        (session, *rest), released = book.entries
        assert rest == ["default", [DETOKENIZER], 3]
        assert released == ("released", session)
        assert session != "call"


async def test_a_refusal_of_the_ledger_frees_the_row():
    async with Serving(Probe(), ledger=Book(CapacityError("all reserved", retry_after=2.5))) as serving:
        error = await serving.refused(Turn(), *steps(1))
        assert (type(error), error.retry_after) == (CapacityError, 2.5)
        assert serving.rows.free == 2


@pytest.mark.parametrize("moment", ["while computing", "while sending"])
async def test_a_client_that_vanishes_frees_everything(moment):
    stage, book = Probe(held=True), Book()
    async with Serving(stage, ledger=book) as serving:
        if moment == "while computing":
            outcomes = ("cancelled",)
            call = serving.call(Turn(), *steps(1))
            await call.read()
        else:
            outcomes = ("cancelled", "error")  # the end of what is sent may be seen before the cancellation
            call = serving.open_call()
            await call.write(serving.request(Turn()))
        before = sum(map(count, outcomes))
        await stage.started.wait()
        assert serving.rows.used == 1
        call.cancel()
        await stage.closed.wait()
        await book.released.wait()
        while serving.rows.used:
            await asyncio.sleep(0)
        while sum(map(count, outcomes)) == before:
            await asyncio.sleep(0)


async def test_the_deadline_of_the_call_ends_the_turn():
    stage = Probe(held=True)
    async with Serving(stage) as serving:
        assert type(await serving.refused(Turn(), *steps(1), timeout=0.1)) is DeadlineError
        await stage.closed.wait()


async def test_no_call_holds_a_row_longer_than_the_settings_allow():
    settings = Settings(listen="127.0.0.1:0", turn_deadline_seconds=0.05)
    async with Serving(Probe(held=True), settings=settings) as serving:
        assert type(await serving.refused(Turn(), *steps(1), timeout=60)) is DeadlineError
        assert serving.rows.free == 2


@pytest.mark.parametrize("turn", [[], [Turn()]], ids=["no turn", "no chunk"])
async def test_a_call_without_deadline_gets_one(turn):
    settings = Settings(listen="127.0.0.1:0", turn_deadline_seconds=0.05)
    async with Serving(Probe(held=True), settings=settings) as serving:
        call = serving.open_call()
        for item in turn:
            await call.write(serving.request(item))
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
        error = from_rpc_error(caught.value)
        assert type(error) is DeadlineError
        assert "allow more time" in str(error)


async def test_a_turn_whose_deadline_has_passed_is_refused():
    turn = Turn()
    turn.deadline.FromSeconds(1)
    async with Serving(Probe()) as serving:
        assert type(await serving.refused(turn, *steps(1))) is DeadlineError


async def test_a_timeout_inside_the_stage_is_not_taken_for_the_deadline():
    async with Serving(Probe(error=TimeoutError())) as serving:
        assert type(await serving.refused(Turn(), *steps(1))).__name__ == "InternalError"


async def test_turns_that_run_go_on_while_new_ones_are_refused():
    async with Serving(FakeDetokenizer()) as serving:
        call = serving.open_call()
        await call.write(serving.request(Turn()))
        for chunk in steps(*range(10)):
            chunk.final = False
            await call.write(serving.request(chunk))
        await call.read()
        serving.direct.close()
        assert type(await serving.refused(Turn(), *steps(1))) is UnavailableError
        await call.write(serving.request(steps(10, index=10)[0]))
        await call.done_writing()
        assert (await rest(call))[-1].final
