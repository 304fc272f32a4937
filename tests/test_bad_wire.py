"""A hostile client against the running service: every mistake gets a precise status, and the next good turn works."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import redis
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status

from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_PCM_F32LE, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, ROLE_USER, Message, Spoken, Text, TrackSampling, TurnOptions
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub
from kimia.v1.turn_pb2 import Caller
from tests.running import ROOT, Service, running

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

QUICK = {
    "KIMIA_ROWS": "16",
    "KIMIA_FAKE_CLIP_SECONDS": "0",
    "KIMIA_FAKE_PREFILL_SECONDS": "0",
    "KIMIA_FAKE_STEP_SECONDS": "0.002",
    "KIMIA_FAKE_REALTIME_FACTOR": "0",
    "KIMIA_FAKE_STEPS": "10",
}
SECONDS = 30.0  # for what takes milliseconds
PREFIX = "/kimia.v1.KimiAudio/"
FORMAT = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
FLOATS = AudioFormat(encoding=ENCODING_PCM_F32LE, sample_rate=48000)
FILE = AudioFormat(encoding=ENCODING_FILE)
FILE_AT_8 = AudioFormat(encoding=ENCODING_FILE, sample_rate=8000)
PIECE = bytes(3200)
NAN, LARGE = float("nan"), 1e300
LONG = "word " * 150  # said in more than a second

REFUSED, STATE, MISSING = "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"


# ---- the service, and a client that may send anything -----------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        with running("--fake") as service:
            yield service


@pytest.fixture(scope="module")
def channel(service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def store(service: Service) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(service.redis_url) as store:
        yield store


@pytest.fixture(autouse=True)
def the_next_good_turn_works(channel: grpc.Channel) -> Iterator[None]:
    yield
    assert generate(channel, pb.GenerateRequest(messages=[asks()]))[-1] == "done"


def asks(text: str = "hello") -> Message:
    return Message(role=ROLE_USER, text=Text(text=text))


def speaks(data: bytes = PIECE, form: AudioFormat = FORMAT, **fields) -> Message:
    return Message(role=ROLE_USER, audio=Clip(format=form, data=data, **fields))


def wire(message) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def open_call(channel: grpc.Channel, method: str, messages):
    """A call with any bytes."""
    if method == "Converse":
        make = channel.stream_stream(PREFIX + method, wire, pb.ConverseResponse.FromString)
        return make(iter(messages), timeout=SECONDS)
    response = {"Generate": pb.GenerateResponse, "Resume": pb.ResumeResponse}.get(method)
    if response is None:
        one = channel.unary_unary(PREFIX + method, wire)
        return iter([one(messages[0], timeout=SECONDS)])
    return channel.unary_stream(PREFIX + method, wire, response.FromString)(messages[0], timeout=SECONDS)


def kinds(responses) -> list[str]:
    found = []
    for response in responses:
        kind = response.WhichOneof("content") if isinstance(response, pb.ConverseResponse) else "event"
        found.append(response.event.WhichOneof("content") if kind == "event" else kind)
    return found


def generate(channel: grpc.Channel, request) -> list[str]:
    return kinds(open_call(channel, "Generate", [request]))


def refusal(channel: grpc.Channel, method: str, *messages) -> tuple[str, str, str]:
    """(code, reason, field) of a call that is refused, with a sentence that names nothing of the inside."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in open_call(channel, method, messages):
            pass
    status = rpc_status.from_call(caught.value)
    assert status is not None, f"not explained: {caught.value.code()} {caught.value.details()}"
    info, wrong = details.ErrorInfo(), details.BadRequest()
    for detail in status.details:
        _ = detail.Unpack(info) or detail.Unpack(wrong)
    assert info.domain == "kimia"
    assert len(status.message) > 20
    assert not re.search(r"Traceback|Error\(|google\.protobuf|redis|line \d", status.message)
    fields = [violation.field for violation in wrong.field_violations]
    return caught.value.code().name, info.reason, fields[0] if fields else ""


def until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# ---- Generate ---------------------------------------------------------------------------------------------------


def sampled(**fields) -> TurnOptions:
    return TurnOptions(text=TrackSampling(**fields))


def with_options(options: TurnOptions) -> pb.GenerateRequest:
    return pb.GenerateRequest(messages=[asks()], options=options)


def answered(*messages: Message) -> pb.GenerateRequest:
    return pb.GenerateRequest(messages=messages)


def codes(*found: int) -> Message:
    return Message(role=ROLE_ASSISTANT, spoken=Spoken(clip=Clip(codes=found), transcript=Text(text="x")))


BAD_REQUESTS = [
    ("nothing", pb.GenerateRequest(), "messages"),
    ("no content", answered(Message(role=ROLE_USER)), "messages[0]"),
    ("no role", answered(Message(text=Text(text="a"))), "messages[0].role"),
    ("unknown role", answered(Message(role=9, text=Text(text="a"))), "messages[0].role"),
    ("nothing to answer", answered(asks(), Message(role=ROLE_ASSISTANT, text=Text(text="a"))), "messages[1]"),
    ("10 000 messages", answered(*[asks("a")] * 10_000), "messages"),
    ("300 clips", answered(*[speaks()] * 300), "messages[256]"),
    ("a text of 1 MB", answered(asks("word " * 200_000)), "messages[0].text.text"),
    ("ids of a user", answered(Message(role=ROLE_USER, text=Text(ids=[1]))), "messages[0].text.ids"),
    ("100 000 codes", answered(codes(*[1] * 100_000), asks()), "messages[0].spoken.clip.codes"),
    ("no format", answered(speaks(form=AudioFormat())), "messages[0].audio.format.encoding"),
    ("unknown encoding", answered(speaks(form=AudioFormat(encoding=99))), "messages[0].audio.format.encoding"),
    ("wrong rate", answered(speaks(form=AudioFormat(encoding=1))), "messages[0].audio.format.sample_rate"),
    ("rate of a file", answered(speaks(form=FILE_AT_8)), "messages[0].audio.format.sample_rate"),
    ("odd bytes", answered(speaks(b"abc")), "messages[0].audio.data"),
    ("empty clip", answered(speaks(b"")), "messages[0].audio.data"),
    ("sound of another turn", answered(speaks(source_turn="a.b")), "messages[0].audio.source_turn"),
    ("blobs of somebody", answered(speaks(feature_keys=["x"])), "messages[0].audio.feature_keys"),
    ("temperature NaN", with_options(sampled(temperature=NAN)), "options.text.temperature"),
    ("temperature huge", with_options(sampled(temperature=LARGE)), "options.text.temperature"),
    ("temperature below 0", with_options(sampled(temperature=-1)), "options.text.temperature"),
    ("penalty 0", with_options(sampled(repetition_penalty=0)), "options.text.repetition_penalty"),
    ("window below 0", with_options(sampled(repetition_window=-1)), "options.text.repetition_window"),
    ("no steps", with_options(TurnOptions(max_new_tokens=0)), "options.max_new_tokens"),
    ("seed too large", with_options(TurnOptions(seed=2**64 - 1)), "options.seed"),
    ("unknown preset", with_options(TurnOptions(preset="x" * 10_000)), "options.preset"),
    ("unknown output", with_options(TurnOptions(output_type=7)), "options.output_type"),
    ("file as output", with_options(TurnOptions(output_format=FILE)), "options.output_format.encoding"),
    ("nothing to say", pb.GenerateRequest(say=" "), "say"),
    ("too much to say", pb.GenerateRequest(say="word " * 100_000), "say"),
    ("tenant with a slash", pb.GenerateRequest(caller=Caller(tenant="a/b"), messages=[asks()]), "caller.tenant"),
    ("session with a blank", pb.GenerateRequest(session_id="a b", messages=[asks()]), "session_id"),
    ("session without end", pb.GenerateRequest(session_id="é" * 100_000, messages=[asks()]), "session_id"),
    ("long key", pb.GenerateRequest(idempotency_key="k" * 129, messages=[asks()]), "idempotency_key"),
    ("unknown class", pb.GenerateRequest(job_class=77, messages=[asks()]), "job_class"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "request_", "field"), BAD_REQUESTS, ids=[case[0] for case in BAD_REQUESTS])
def test_wrong_requests_name_their_field(channel: grpc.Channel, name: str, request_, field: str) -> None:
    assert refusal(channel, "Generate", request_) == (REFUSED, "INVALID_REQUEST", field)


def test_fields_of_a_newer_version_do_no_harm(channel: grpc.Channel) -> None:
    assert generate(channel, wire(answered(asks())) + b"\xfa\x3e\x03abc")[-1] == "done"


@pytest.mark.parametrize("method", ["Generate", "Resume", "GetSession", "DeleteSession", "Converse"])
@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x12\x03\xff\xfe\xfd"], ids=["garbage", "no UTF-8"])
def test_bytes_that_are_no_message(channel: grpc.Channel, method: str, data: bytes) -> None:
    assert refusal(channel, method, data) == (REFUSED, "MALFORMED", "")


@pytest.mark.parametrize("method", ["Generate", "Converse"])
def test_messages_that_are_too_large(channel: grpc.Channel, method: str) -> None:
    text = "x" * (9 << 20)
    large = answered(asks(text)) if method == "Generate" else pb.ConverseRequest(text=pb.CallerText(text=text))
    assert refusal(channel, method, large) == (REFUSED, "MESSAGE_SIZE", "")
    with pytest.raises(grpc.RpcError) as caught:
        list(open_call(channel, method, [wire(large) * 3]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- Converse ---------------------------------------------------------------------------------------------------


def says(**content) -> pb.ConverseRequest:
    return pb.ConverseRequest(**content)


def config(**fields) -> pb.ConverseRequest:
    fields.setdefault("input_format", FORMAT)
    return says(config=pb.CallConfig(**fields))


def audio(index: int = 0, data: bytes = PIECE) -> pb.ConverseRequest:
    return says(audio=pb.CallerAudio(index=index, data=data))


MESSAGES = {
    "config": config(),
    "audio": audio(),
    "text": says(text=pb.CallerText(text="hello")),
    "say": says(say=pb.Say(text=LONG)),
    "commit": says(commit=pb.Commit()),
    "cancel": says(cancel=pb.Cancel()),
    "playback": says(playback=pb.Playback(heard_ms=2**64 - 1)),
    "clear": says(clear=pb.Clear()),
    "speculate": says(speculate=pb.Speculate()),
    "confirm": says(confirm=pb.Confirm()),
    "retract": says(retract=pb.Retract()),
    "empty": says(),
}
NEVER = {name: ("UNIMPLEMENTED", "UNSUPPORTED", name) for name in ("speculate", "confirm", "retract")}
ALWAYS_WRONG = {**NEVER, "config": (STATE, "WRONG_STATE", "config"), "empty": (REFUSED, "INVALID_REQUEST", "content")}
PAIRS = [(first, second) for first in MESSAGES for second in MESSAGES if first not in ALWAYS_WRONG]


def verdict(first: str, second: str) -> tuple[str, str, str] | None:
    """How a call ends that sends this pair after its configuration; None: well."""
    for before, name in (("", first), (first, second)):
        if name in ALWAYS_WRONG:
            return ALWAYS_WRONG[name]
        if name == "commit" and before not in ("audio", "text"):
            return STATE, "WRONG_STATE", name
    return (STATE, "WRONG_STATE", "say") if first == second == "say" else None


@pytest.mark.parametrize("name", MESSAGES)
def test_a_call_begins_with_its_configuration(channel: grpc.Channel, name: str) -> None:
    if name != "config":
        expected = ALWAYS_WRONG.get(name, (STATE, "WRONG_STATE", name))
        assert refusal(channel, "Converse", MESSAGES[name]) == expected


@pytest.mark.parametrize("name", ALWAYS_WRONG)
def test_what_is_wrong_at_any_time(channel: grpc.Channel, name: str) -> None:
    assert refusal(channel, "Converse", config(), MESSAGES[name]) == ALWAYS_WRONG[name]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids="-".join)
def test_every_pair_of_messages(channel: grpc.Channel, first: str, second: str) -> None:
    again = audio(1) if first == second == "audio" else MESSAGES[second]
    messages, expected = (config(), MESSAGES[first], again), verdict(first, second)
    if expected is not None:
        assert refusal(channel, "Converse", *messages) == expected
    elif "say" in (first, second):
        closing = [] if (first, second) == ("say", "cancel") else [MESSAGES["cancel"]]
        assert "cancelled" in kinds(open_call(channel, "Converse", [*messages, *closing]))
    else:
        assert "failed" not in kinds(open_call(channel, "Converse", messages))


UNKNOWN = TurnOptions(preset="x")
BAD_CALLS = [
    ("gap", [config(), audio(0), audio(5)], "audio.index"),
    ("huge index", [config(), audio(2**64 - 1)], "audio.index"),
    ("odd bytes", [config(), audio(0, b"abc")], "audio.data"),
    ("nothing in it", [config(), audio(0, b"")], "audio.data"),
    ("two seconds at once", [config(), audio(0, bytes(64000))], "audio.data"),
    ("more than 64 KiB", [config(input_format=FLOATS), audio(0, bytes(68000))], "audio.data"),
    ("a file", [config(input_format=FILE)], "config.input_format.encoding"),
    ("no format", [says(config=pb.CallConfig())], "config.input_format.encoding"),
    ("no session id", [config(session_id="a b")], "config.session_id"),
    ("history without role", [config(messages=[Message()])], "config.messages[0].role"),
    ("empty text", [config(), says(text=pb.CallerText())], "text.text"),
    ("a text of 1 MB", [config(), says(text=pb.CallerText(text="x" * 1_000_000))], "text.text"),
    ("nothing to say", [config(), says(say=pb.Say(text="\n"))], "say.text"),
    ("wrong option", [config(), audio(), says(commit=pb.Commit(options=UNKNOWN))], "commit.options.preset"),
    ("long key", [config(), says(commit=pb.Commit(idempotency_key="k" * 200))], "commit.idempotency_key"),
    ("no turn id", [config(), says(cancel=pb.Cancel(turn_id="x" * 1_000_000))], "cancel.turn_id"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "field"), BAD_CALLS, ids=[case[0] for case in BAD_CALLS])
def test_wrong_messages_of_a_call_name_their_field(channel: grpc.Channel, name: str, messages, field: str) -> None:
    assert refusal(channel, "Converse", *messages) == (REFUSED, "INVALID_REQUEST", field)


def test_mistakes_do_not_lock_others_out(channel: grpc.Channel) -> None:
    """More calls than there are rows, each ended by its own mistake."""
    for _ in range(2 * int(QUICK["KIMIA_ROWS"])):
        assert refusal(channel, "Converse", config(), MESSAGES["commit"])[0] == STATE


# ---- turns and sessions of others -------------------------------------------------------------------------------


@pytest.fixture
def told(channel: grpc.Channel, store: redis.Redis) -> Iterator[str]:
    """A turn of the session `mine` of the tenant `a`; afterwards nothing of it is left."""
    request = pb.GenerateRequest(caller=Caller(tenant="a"), session_id="mine", messages=[speaks()])
    events = [response.event for response in KimiAudioStub(channel).Generate(request)]
    yield events[0].turn_id
    store.delete("{0}:gone:mine")


def test_turns_that_cannot_be_resumed(channel: grpc.Channel, told: str) -> None:
    mine = Caller(tenant="a")
    missing = (MISSING, "NOT_FOUND", "turn_id")
    assert kinds(open_call(channel, "Resume", [pb.ResumeRequest(caller=mine, turn_id=told)]))[-1] == "done"
    assert refusal(channel, "Resume", pb.ResumeRequest(turn_id=told)) == missing
    assert refusal(channel, "Resume", pb.ResumeRequest(caller=mine, turn_id="mine.other")) == missing
    for junk in ("", "*.*", "../x"):
        assert refusal(channel, "Resume", pb.ResumeRequest(turn_id=junk)) == (REFUSED, "INVALID_REQUEST", "turn_id")
    beyond = pb.ResumeRequest(caller=mine, turn_id=told, last_audio_index=2**32 - 1)
    assert refusal(channel, "Resume", beyond) == (REFUSED, "INVALID_REQUEST", "last_audio_index")
    KimiAudioStub(channel).DeleteSession(pb.DeleteSessionRequest(caller=mine, session_id="mine"))
    assert refusal(channel, "Resume", pb.ResumeRequest(caller=mine, turn_id=told)) == missing


def test_a_turn_that_has_expired(channel: grpc.Channel, store: redis.Redis, told: str) -> None:
    for key in store.scan_iter(f"*{told}*"):
        store.pexpire(key, 1)
    until(lambda: not store.exists(f"{{0}}:turn:{told}"))
    mine = Caller(tenant="a")
    expired = refusal(channel, "Resume", pb.ResumeRequest(caller=mine, turn_id=told))
    assert expired == (MISSING, "NOT_FOUND", "turn_id")
    KimiAudioStub(channel).DeleteSession(pb.DeleteSessionRequest(caller=mine, session_id="mine"))


def test_sessions_of_others_and_deleted_ones(channel: grpc.Channel, store: redis.Redis, told: str) -> None:
    missing = (MISSING, "NOT_FOUND", "session_id")
    calls = {
        "Generate": lambda caller: pb.GenerateRequest(caller=caller, session_id="mine", messages=[asks()]),
        "Converse": lambda caller: config(caller=caller, session_id="mine"),
        "GetSession": lambda caller: pb.GetSessionRequest(caller=caller, session_id="mine"),
        "DeleteSession": lambda caller: pb.DeleteSessionRequest(caller=caller, session_id="mine"),
    }
    for method, make in calls.items():
        assert refusal(channel, method, make(Caller(tenant="b"))) == missing
    KimiAudioStub(channel).DeleteSession(calls["DeleteSession"](Caller(tenant="a")))
    assert [key.decode() for key in store.scan_iter("*mine*")] == ["{0}:gone:mine"]
    for method, make in calls.items():
        assert refusal(channel, method, make(Caller(tenant="a"))) == missing


# ---- connections, vanished clients, the store -------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes.fromhex("16030100c8010000c40303") + bytes(range(197)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 10,
        bytes(100_000),
    ],
    ids=["HTTP/1", "TLS", "broken HTTP/2", "zeros"],
)
def test_what_is_no_grpc_is_hung_up(service: Service, data: bytes) -> None:
    host, port = service.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        try:
            connection.sendall(data)
            while connection.recv(4096):
                pass
        except ConnectionError:
            return


def test_many_connections(service: Service, channel: grpc.Channel) -> None:
    host, port = service.address.rsplit(":", 1)
    connections = [socket.create_connection((host, int(port)), SECONDS) for _ in range(500)]
    assert generate(channel, answered(asks()))[-1] == "done"
    for connection in connections:
        connection.close()


VANISHER = f"""
import os, signal, sys, time
import grpc
from tests.test_bad_wire import LONG, config, open_call, pb, says
with grpc.insecure_channel(sys.argv[1]) as channel:
    request = pb.GenerateRequest(say=LONG)
    calls = [open_call(channel, "Generate", [request]) for _ in range(4)]
    for n in range(4):
        def messages(n=n):
            yield config(session_id="vanished-%d" % n)
            yield says(say=pb.Say(text=LONG))
            time.sleep({SECONDS})
        calls.append(open_call(channel, "Converse", messages()))
    for n, call in enumerate(calls):
        for _ in range(1 + n):
            next(call)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clients_that_are_killed_in_mid_turn(service: Service, channel: grpc.Channel, store: redis.Redis) -> None:
    before = set(store.scan_iter("{0}:turn:*"))
    killed = subprocess.run([sys.executable, "-c", VANISHER, service.address], cwd=ROOT, check=False, timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL
    until(lambda: all(b"vanished" in key for key in set(store.scan_iter("{0}:turn:*")) - before))
    sessions = [f"vanished-{n}" for n in range(4)]
    for session in sessions:
        KimiAudioStub(channel).DeleteSession(pb.DeleteSessionRequest(session_id=session))
    until(lambda: not any(used for _, used in rows(store)))
    assert sorted(key.decode() for key in store.scan_iter("*vanished*")) == [f"{{0}}:gone:{s}" for s in sessions]


def test_a_store_that_is_away_or_full_for_a_while_costs_no_turn(channel: grpc.Channel, store: redis.Redis) -> None:
    troubles = [lambda: store.client_pause(1500), lambda: squeeze(store, 1.0)]
    for trouble in troubles:
        turn = open_call(channel, "Generate", [pb.GenerateRequest(say=LONG)])
        next(turn)
        timer = threading.Thread(target=trouble)
        timer.start()
        assert kinds(turn)[-1] == "done"
        timer.join()


def squeeze(store: redis.Redis, seconds: float) -> None:
    """No memory for so long."""
    store.config_set("maxmemory", 1)
    try:
        time.sleep(seconds)
    finally:
        store.config_set("maxmemory", 0)


# ---- in the end -------------------------------------------------------------------------------------------------


def rows(store: redis.Redis) -> list[tuple[int, int]]:
    """(rows, used) of every worker."""
    workers = [words.split() for key in store.scan_iter("{ledger}:workers:*") for words in store.hvals(key)]
    return [(int(count), int(used)) for count, used, _ in workers]


def test_after_all_that_nothing_is_left(channel: grpc.Channel, store: redis.Redis) -> None:
    for key in store.scan_iter("{0}:session:*"):
        session = key.decode().split(":")[2]
        if store.exists(f"{{0}}:session:{session}"):
            KimiAudioStub(channel).DeleteSession(pb.DeleteSessionRequest(session_id=session))
    until(lambda: not any(used for _, used in rows(store)))
    until(lambda: not any(store.zcard(key) for key in store.scan_iter("{ledger}:reserved:*")))
    assert len(rows(store)) == 3
    left = {re.sub(r"^(\{\w+\}:\w+).*", r"\1", key.decode()) for key in store.scan_iter("*")}
    assert left <= {
        "{0}:gone",
        "{0}:inbox",
        "{0}:jobs",
        "{0}:token",
        "{0}:blob",
        "{ledger}:workers",
        "{ledger}:released",
        "{ledger}:partitions",
    }
    for_ever = {key.decode() for key in store.scan_iter("*") if store.ttl(key) == -1}
    assert {key for key in for_ever if not key.startswith(("{0}:jobs:", "{0}:token:", "{ledger}:"))} == set()
