"""Requests of the contract, and sessions from it."""

import datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from kimia.client.connection import Identity
from kimia.client.requests import (
    call_config,
    check_text,
    generate_request,
    new_key,
    read_session,
    say_request,
    transcribe_request,
)
from kimia.errors import ConversationError, ParameterError
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_BOTH, OUTPUT_TYPE_TEXT
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, JOB_CLASS_UNSPECIFIED
from tests.client.turns import QUESTION

pytestmark = pytest.mark.unit

WHO = Identity("acme")


def test_a_question() -> None:
    request = generate_request(WHO, QUESTION, "both", {"session": "s", "idempotency_key": "k", "seed": 3})
    assert (request.caller.tenant, request.session_id, request.idempotency_key) == ("acme", "s", "k")
    assert (request.options.output_type, request.options.seed) == (OUTPUT_TYPE_BOTH, 3)
    assert (request.job_class, request.HasField("say")) == (JOB_CLASS_UNSPECIFIED, False)


def test_every_request_has_a_key_of_its_own() -> None:
    first, second = (generate_request(WHO, QUESTION, "text", {}).idempotency_key for _ in range(2))
    assert first
    assert first != second
    assert new_key() != new_key()


def test_a_sentence_to_say() -> None:
    request = say_request(WHO, "Hi.", QUESTION, {"batch": True})
    assert (request.say, len(request.messages), request.job_class) == ("Hi.", 1, JOB_CLASS_BATCH)
    assert request.options.output_type == OUTPUT_TYPE_BOTH


def test_a_transcript() -> None:
    request = transcribe_request(WHO, b"RIFF", "Write it down:", {})
    assert [message.WhichOneof("content") for message in request.messages] == ["text", "audio"]
    assert request.messages[0].text.text == "Write it down:"
    assert request.options.output_type == OUTPUT_TYPE_TEXT


def test_a_call() -> None:
    config = call_config(WHO, QUESTION, "text", {"session": "s", "input_rate": 8000, "seed": 2})
    assert (config.session_id, config.input_format.sample_rate, config.options.seed) == ("s", 8000, 2)
    assert len(config.messages) == 1
    assert call_config(WHO, (), "both", {}).input_format.sample_rate == 16000


@pytest.mark.parametrize(
    ("chat", "rule"),
    [([], "is empty"), ([{"role": "assistant", "message_type": "text", "content": "Hi"}], "ends with the assistant")],
)
def test_nothing_to_answer(chat, rule) -> None:
    with pytest.raises(ConversationError, match=rule):
        generate_request(WHO, chat, "both", {})


@pytest.mark.parametrize(("text", "rule"), [("", "is empty"), (5, "must be a string")])
def test_nothing_to_say(text, rule) -> None:
    with pytest.raises(ParameterError, match=rule):
        check_text(text)


def test_a_session() -> None:
    begun = Timestamp(seconds=1_700_000_000)
    response = pb.GetSessionResponse(session_id="s", create_time=begun, turn_ids=["s.1"], running_turn_id="s.1")
    session = read_session(response)
    assert session.create_time == datetime.datetime(2023, 11, 14, 22, 13, 20, tzinfo=datetime.UTC)
    assert (session.expire_time, session.turn_ids, session.running_turn_id) == (None, ("s.1",), "s.1")
