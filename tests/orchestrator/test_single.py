import asyncio
import time

import grpc
import pytest

from kimia.errors import CapacityError, NotFoundError, RequestError, StateError
from kimia.runtime.fake import TOKEN_OFFSET, read_pcm
from kimia.stage import DETOKENIZER
from kimia.status import from_rpc_error
from kimia.streams.journal import Journal
from kimia.streams.wire import Wire
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.audio_pb2 import ENCODING_MULAW, AudioFormat
from kimia.v1.conversation_pb2 import TurnOptions
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, STOP_REASON_AUDIO_EOD, STOP_REASON_TEXT_EOS, Failure
from orchestrator.desk import Limits
from orchestrator.sound import OutputSound
from tests.orchestrator.world import (
    ENDLESS,
    NATIVE,
    STEADY,
    TEXT_ONLY,
    asks,
    by_kind,
    indices,
    kinds,
    pcm_of,
    speaks,
    text_of,
)
from tests.runtime.workers import SECONDS

pytestmark = pytest.mark.unit


@pytest.fixture
def asked(monkeypatch):
    """What orchestrators ask the journal for, call by call."""
    calls = []
    for owner, names in ((Wire, ["call"]), (Journal, ["head", "load_session"])):
        for name in names:
            plain = getattr(owner, name)

            async def noted(self, *args, plain=plain, name=name):
                calls.append(args[0] if name == "call" else name)
                return await plain(self, *args)

            monkeypatch.setattr(owner, name, noted)
    return calls


async def refused(stream):
    """The error of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stream:
            pass
    return from_rpc_error(caught.value)


# ---- Generate ---------------------------------------------------------------------------------------------------


async def test_text_is_answered_with_text(world):
    await world.begin()
    events = await world.generate(asks(), options=TEXT_ONLY)
    assert kinds(events) == ["started", *["text"] * (len(events) - 2), "done"]
    assert indices(events, "text") == list(range(len(events) - 2))
    done = events[-1].done
    assert done.text == text_of(events)
    assert done.stop == STOP_REASON_TEXT_EOS
    assert done.usage.steps == 40
    assert not done.usage.audio_samples


START = ["ledger_reserve", "save", "open", "append", "load_session", "head", "save", "submit"]


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        ("", ["ledger_reserve", "save", "open", "append", "save", "submit"]),
        ("s1", ["load_session", "ledger_reserve", "load_session", "save", "open", "append", "save", "submit"]),
    ],
    ids=["one request", "a session that begins"],
)
async def test_a_turn_starts_with_so_many_round_trips(world, asked, session, expected):
    await world.begin()
    asked.clear()
    await world.generate(speaks(), session_id=session)
    seen = [name for name in asked if name in START]
    assert seen[: seen.index("submit") + 1] == expected


async def test_sound_is_answered_with_text_and_speech(world):
    await world.begin()
    events = await world.generate(speaks(), asks("what was that?"), options=TurnOptions(seed=3))
    started, done = events[0].started, events[-1].done
    assert (started.seed, started.output_format) == (3, NATIVE)
    assert indices(events, "text") == list(range(len(indices(events, "text"))))
    assert indices(events, "audio") == list(range(len(indices(events, "audio"))))
    spoken = read_pcm(pcm_of(events))
    assert [position for position, _ in spoken] == list(range(done.usage.audio_codes))
    assert done.usage.audio_codes == 33  # 40 steps less the delay of 6 and the end
    assert done.usage.audio_samples == 33 * 1920
    assert done.stop == STOP_REASON_AUDIO_EOD
    assert done.text == text_of(events)


async def test_a_turn_says_where_its_time_went(world):
    await world.begin()
    latency = (await world.generate(speaks()))[-1].done.latency
    assert [stage.stage for stage in latency.stages] == [1, 2, 3]
    assert all(stage.worker for stage in latency.stages)
    total = latency.total.ToMicroseconds()
    assert 0 < latency.first_text.ToMicroseconds() <= latency.first_audio.ToMicroseconds() <= total
    for stage in latency.stages:
        times = [getattr(stage, name).ToMicroseconds() for name in ("queued", "claimed", "first", "done")]
        assert times == sorted(times)


async def test_a_given_text_is_said(world):
    await world.begin()
    request = pb.GenerateRequest(say="good morning to you")
    events = [response.event async for response in world.stub.Generate(request)]
    assert text_of(events) == "good morning to you"
    assert pcm_of(events)


async def test_a_seed_that_was_told_repeats_the_turn(world):
    await world.begin()
    first = await world.generate(speaks())
    again = await world.generate(speaks(), options=TurnOptions(seed=first[0].started.seed))
    assert pcm_of(again) == pcm_of(first)
    other = await world.generate(speaks())
    assert other[0].started.seed != first[0].started.seed


async def test_telephone_speech_is_the_native_speech_transcoded(world):
    await world.begin()
    form = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)
    options = TurnOptions(seed=5, output_format=form)
    events = await world.generate(speaks(), options=options)
    native = await world.generate(speaks(), options=TurnOptions(seed=5), session_id="kept")
    sound = OutputSound(form)
    log = await world.journal.read(native[0].turn_id, "audio")
    pieces = [sound.feed(chunk.speech, chunk.final) for chunk in log]
    assert [event.audio.data for event in events if event.HasField("audio")] == [piece for piece in pieces if piece]
    assert events[-1].done.usage.audio_samples == len(pcm_of(events)) == len(pcm_of(native)) // 6


async def test_batch_turns_are_served(world):
    await world.begin()
    events = await world.generate(asks(), options=TEXT_ONLY, job_class=JOB_CLASS_BATCH, session_id="s")
    assert events[-1].HasField("done")
    assert (await world.spec(events[0].turn_id)).job_class == JOB_CLASS_BATCH


async def test_a_turn_has_the_deadline_of_its_request(world):
    await world.begin()
    for timeout, longest in ((30, 31), (3600, 121)):
        stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id=f"s{timeout}"), timeout=timeout)
        spec = await world.spec((await stream.read()).event.turn_id)
        assert longest - 11 < spec.deadline.ToNanoseconds() / 1e9 - time.time() < longest
        stream.cancel()


async def test_a_turn_that_no_worker_takes_ends_at_its_deadline(world):
    """Its llm runs, and nobody is left to speak."""
    await world.begin(limits=Limits(turn_seconds=0.3))
    await world.kill(next(worker for worker in world.running if worker.kind is DETOKENIZER))
    events = await world.generate(asks(), session_id="s")
    assert kinds(events)[-1] == "failed"
    assert (events[-1].failed.reason, events[-1].failed.code) == ("DEADLINE_EXCEEDED", 4)
    assert "detokenizer" in events[-1].failed.message
    await world.afterwards()
    assert set((await world.reserved()).values()) == {0}


async def test_a_failed_turn_says_why(world):
    await world.begin(STEADY)
    events = await world.generate(options=TEXT_ONLY, session_id="s")
    assert events[-1].HasField("done")
    stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id="s"))
    failure = Failure(code=13, reason="BROKEN", message="try another")
    await world.journal.fail((await stream.read()).event.turn_id, failure)
    while (event := (await stream.read()).event).WhichOneof("content") in ("text", "audio"):
        pass
    assert event.failed == failure
    assert len((await world.session("s")).messages) == 2


# ---- refused ----------------------------------------------------------------------------------------------------

REFUSED = {
    "messages": pb.GenerateRequest(),
    "messages[0].role": pb.GenerateRequest(messages=[{"text": {"text": "be brief"}}]),
    "options.preset": pb.GenerateRequest(messages=[asks()], options=TurnOptions(preset="fast")),
    "session_id": pb.GenerateRequest(messages=[asks()], session_id="a b"),
    "caller.tenant": pb.GenerateRequest(messages=[asks()], caller={"tenant": "a:b"}),
}


@pytest.mark.parametrize("field", REFUSED)
async def test_a_wrong_request_is_refused_before_anything_is_stored(world, field):
    await world.host()
    error = await refused(world.stub.Generate(REFUSED[field]))
    assert isinstance(error, RequestError)
    assert error.field == field
    assert await world.keys("") == await world.keys("inbox")


async def test_without_capacity_nothing_begins(world):
    await world.host()
    error = await refused(world.stub.Generate(pb.GenerateRequest(messages=[asks()])))
    assert isinstance(error, CapacityError)
    assert error.retry_after > 0
    assert await world.keys("turn") == []


async def test_rows_are_reserved_while_a_turn_runs(world):
    await world.begin(ENDLESS, rows=1)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[speaks()]))
    await stream.read()
    assert await world.reserved() == {"tokenizer": 1, "llm": 1, "detokenizer": 1}
    error = await refused(world.stub.Generate(pb.GenerateRequest(messages=[asks()])))
    assert isinstance(error, CapacityError)
    stream.cancel()


# ---- one conversation, one request ------------------------------------------------------------------------------


async def test_nothing_is_left_of_a_conversation_of_one_request(world):
    await world.begin()
    events = await world.generate(speaks())
    session = events[0].started.session_id

    async def nothing_left():
        return await world.keys(session) == [f"{{0}}:gone:{session}"]

    await world.until_async(nothing_left)
    assert await world.wire.blobs.keys("*blob*") == []
    assert set((await world.reserved()).values()) == {0}


async def test_a_client_that_vanishes_frees_rows_and_keys(world):
    await world.begin(ENDLESS)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[speaks()]))
    session = (await stream.read()).event.started.session_id
    while not (await stream.read()).event.HasField("audio"):
        pass
    assert world.rows_used()
    stream.cancel()

    async def nothing_left():
        free = not world.rows_used() and set((await world.reserved()).values()) == {0}
        return free and await world.keys(session) == [f"{{0}}:gone:{session}"]

    await world.until_async(nothing_left)


async def test_a_client_that_vanishes_before_its_turn_began_leaves_nothing(world, monkeypatch):
    await world.begin(ENDLESS)
    turns, opening, go_on = world.hosts[0].desk.turns, asyncio.Event(), asyncio.Event()
    begin = turns.records.begin

    async def slowly(*args, **kwargs):
        opening.set()
        await go_on.wait()
        return await begin(*args, **kwargs)

    monkeypatch.setattr(turns.records, "begin", slowly)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()]))
    await opening.wait()
    stream.cancel()
    await world.hosts[0].servicer.ended(SECONDS)
    go_on.set()
    await world.afterwards()
    assert await world.keys("turn") == await world.keys("session") == []
    assert set((await world.reserved()).values()) == {0}


async def test_a_client_with_a_key_may_come_back(world):
    await world.begin(STEADY)
    request = pb.GenerateRequest(messages=[speaks()], idempotency_key="k")
    stream = world.stub.Generate(request)
    turn_id = (await stream.read()).event.turn_id
    stream.cancel()
    events = await world.resume(turn_id)
    assert events[0].HasField("started")
    assert events[-1].HasField("done")


async def test_a_client_with_a_key_that_does_not_come_back_leaves_nothing(world):
    await world.begin(ENDLESS, window=0.1)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[speaks()], idempotency_key="k"))
    session = (await stream.read()).event.started.session_id
    stream.cancel()

    async def nothing_left():
        return await world.keys(session) == [f"{{0}}:gone:{session}"] and not world.rows_used()

    await world.until_async(nothing_left)
    again = world.stub.Generate(pb.GenerateRequest(messages=[speaks()], idempotency_key="k"))
    assert (await again.read()).event.started.session_id != session
    again.cancel()


async def test_the_same_key_follows_the_same_turn(world):
    await world.begin(STEADY)
    both = await asyncio.gather(*(world.generate(speaks(), idempotency_key="k") for _ in range(2)))
    assert by_kind(both[0]) == by_kind(both[1])
    later = await world.generate(speaks(), idempotency_key="k")
    assert by_kind(later) == by_kind(both[0])
    other = await world.generate(speaks(), idempotency_key="k", caller={"tenant": "other"})
    assert other[0].turn_id != both[0][0].turn_id


# ---- sessions ---------------------------------------------------------------------------------------------------


async def test_a_session_remembers(world):
    await world.begin()
    first = await world.generate(speaks(salt=1), session_id="s")
    second = await world.generate(speaks(salt=2), session_id="s", options=TEXT_ONLY)
    spec = await world.spec(second[0].turn_id)
    assert [message.WhichOneof("content") for message in spec.messages] == ["audio", "spoken", "audio"]
    heard, said, new = spec.messages
    assert heard.audio.feature_keys
    assert heard.audio.codes
    assert not new.audio.feature_keys
    codes = [code for _, code in read_pcm(pcm_of(first))]
    assert list(said.spoken.clip.codes) == codes
    steps = [chunk.step for chunk in await world.journal.read(first[0].turn_id, "tokens")]
    assert list(said.spoken.transcript.ids) == [step.text_id for step in steps if step.in_transcript]
    assert [step.audio_id - TOKEN_OFFSET for step in steps if step.HasField("code")] == codes
    encoded = await world.journal.read(second[0].turn_id, "encoded")
    assert {chunk.encoded.clip for chunk in encoded} == {new.audio.number}


async def test_sound_whose_features_are_gone_is_encoded_again(world):
    await world.begin()
    first = await world.generate(speaks(salt=1), session_id="s")
    await world.wire.blobs.delete(*await world.wire.blobs.keys("*blob*"))
    second = await world.generate(asks(), session_id="s")
    spec = await world.spec(second[0].turn_id)
    assert list(spec.route) == [1, 2, 3]
    assert spec.messages[0].audio.source_turn == first[0].turn_id
    third = await world.generate(asks(), session_id="s")
    assert list((await world.spec(third[0].turn_id)).route) == [2, 3]


async def test_a_turn_waits_for_the_one_before(world):
    await world.begin(ENDLESS)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id="s"))
    await stream.read()
    error = await refused(world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id="s")))
    assert isinstance(error, StateError)
    stream.cancel()


async def test_a_turn_of_a_session_goes_on_without_its_client(world):
    await world.begin(STEADY)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id="s"))
    turn_id = (await stream.read()).event.turn_id
    stream.cancel()
    await world.ended(turn_id)
    session = await world.session("s")
    assert session.running_turn_id == ""
    assert len(session.messages) == 2
    assert list(session.turn_ids) == [turn_id]


# ---- Resume -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def told(world):
    """A turn as a client received it that lost nothing."""
    await world.begin(STEADY)
    await world.host()
    form = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)
    return await world.generate(speaks(), session_id="s", options=TurnOptions(seed=1, output_format=form))


def last_index(events, kind):
    found = indices(events, kind)
    return found[-1] if found else None


async def test_resume_gives_exactly_the_rest_wherever_the_connection_was_lost(world, told):
    for cut in range(1, len(told)):
        received = told[:cut]
        audio, text = last_index(received, "audio"), last_index(received, "text")
        rest = await world.resume(told[0].turn_id, audio, text, host=cut % 2)
        if audio is None and text is None:
            assert rest[0] == told[0]
            rest = rest[1:]
        assert by_kind(rest) == by_kind(told[cut:])


@pytest.mark.parametrize("field", ["last_audio_index", "last_text_index"])
async def test_nobody_has_more_of_a_turn_than_there_is(world, told, field):
    end = last_index(told, field.split("_")[1])
    request = pb.ResumeRequest(turn_id=told[0].turn_id, **{field: end})
    assert kinds([response.event async for response in world.stub.Resume(request)])[-1] == "done"
    error = await refused(world.stub.Resume(pb.ResumeRequest(turn_id=told[0].turn_id, **{field: end + 1})))
    assert isinstance(error, RequestError)
    assert error.field == field


async def test_resume_elsewhere_while_the_turn_runs(world):
    await world.begin(STEADY)
    await world.host()
    stream = world.hosts[0].stub.Generate(pb.GenerateRequest(messages=[speaks()], session_id="s"))
    received = [(await stream.read()).event for _ in range(8)]
    stream.cancel()
    turn_id = received[0].turn_id
    rest = await world.resume(turn_id, last_index(received, "audio"), last_index(received, "text"), host=1)
    whole = await world.resume(turn_id)
    assert indices(received + rest, "audio") == indices(whole, "audio")
    assert indices(received + rest, "text") == indices(whole, "text")
    assert pcm_of(received + rest) == pcm_of(whole)
    assert rest[-1] == whole[-1]


async def test_nobody_resumes_the_turn_of_another_tenant(world, told):
    request = pb.ResumeRequest(turn_id=told[0].turn_id, caller={"tenant": "other"})
    assert isinstance(await refused(world.stub.Resume(request)), NotFoundError)


@pytest.mark.parametrize(("turn_id", "kind"), [("s.unknown", NotFoundError), ("nonsense", RequestError)])
async def test_turns_that_do_not_exist_are_not_resumed(world, turn_id, kind):
    await world.host()
    error = await refused(world.stub.Resume(pb.ResumeRequest(turn_id=turn_id)))
    assert isinstance(error, kind)
    assert error.field == "turn_id"
