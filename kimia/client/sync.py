"""The client for plain, blocking Python.

    with Kimia("localhost:50051") as kimia:
        for event in kimia.generate([{"role": "user", "message_type": "audio", "content": "question.wav"}]):
            ...
        answer = kimia.say("Your order is on its way.").collect()

A lost connection is taken up again from the last event, a bounded number of times: nothing is lost or comes twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from kimia.client.chat import Chat
from kimia.client.connection import (
    DEFAULT_TARGET,
    DEFAULTS,
    ClientOptions,
    Deadline,
    Identity,
    Patience,
    channel_options,
    check_size,
    unreachable,
)
from kimia.client.events import Answer, Ended, Event
from kimia.client.options import TurnSettings
from kimia.client.progress import TurnProgress, TurnView
from kimia.client.requests import (
    CallSettings,
    Session,
    call_config,
    generate_request,
    read_session,
    say_request,
    transcribe_request,
)
from kimia.client.sync_call import Call
from kimia.errors import NotFoundError
from kimia.model.instructions import TRANSCRIBE
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub

T = TypeVar("T")


class Kimia:
    """A client of the service at `target` ("host:port", or any name that gRPC resolves). Threads may share it.

    Without `credentials` the connection is plain text; give `grpc.ssl_channel_credentials(...)` for TLS. Every method
    raises kimia.errors: what the service refuses keeps its class, a service that is away gives UnavailableError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tenant: str = "",
        identity: Identity | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: ClientOptions = DEFAULTS,
    ) -> None:
        self.target = target
        self.options = options
        self._identity = identity or Identity(tenant)
        settings = channel_options(options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, settings)
        else:
            self._channel = grpc.secure_channel(target, credentials, settings)
        self._stub = KimiAudioStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self, timeout: float = 5.0) -> None:
        """Wait until the service answers. Raises UnavailableError after `timeout` seconds."""
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout)
        except grpc.FutureTimeoutError as error:
            ready.cancel()
            raise unreachable(self.target) from error

    def close(self) -> None:
        """Close the connection; running turns go on in the service and can be resumed."""
        self._channel.close()

    # ---- turns ----

    def generate(self, chats: Chat, output_type: str = "both", **settings: Unpack[TurnSettings]) -> Turn:
        """Answer a conversation, or go on with a session. Raises ConversationError, AudioError, ParameterError."""
        return self._turn(generate_request(self._identity, chats, output_type, settings))

    def say(self, text: str, chats: Chat = (), **settings: Unpack[TurnSettings]) -> Turn:
        """Speak `text`, in the voice that the conversation before it suggests."""
        return self._turn(say_request(self._identity, text, chats, settings))

    def transcribe(self, audio: Any, instruction: str = TRANSCRIBE, **settings: Unpack[TurnSettings]) -> str:
        """What is said in a sound: a path, the bytes of a file or (PCM bytes, rate)."""
        return self._turn(transcribe_request(self._identity, audio, instruction, settings)).collect().text

    def resume(self, turn_id: str, last_audio: int | None = None, last_text: int | None = None) -> Turn:
        """Go on with a turn after the last indices received (None: nothing was received)."""
        return self.resume_progress(TurnProgress.resumed(turn_id, last_audio, last_text))

    def converse(self, chats: Chat = (), output_type: str = "both", **settings: Unpack[CallSettings]) -> Call:
        """A call. Enter it as a context manager; `chats` is what was said before it."""
        config = call_config(self._identity, chats, output_type, settings)
        check_size(config, self.options.max_request_bytes)
        return Call(self._stub, config, self.options, self)

    # ---- sessions ----

    def session(self, session_id: str) -> Session:
        """What is remembered of a session. Raises NotFoundError."""
        request = pb.GetSessionRequest(caller=self._identity.caller(), session_id=session_id)
        return read_session(self._unary(lambda: self._stub.GetSession(request)))

    def delete_session(self, session_id: str) -> None:
        """Delete a session for good. Raises NotFoundError."""
        request = pb.DeleteSessionRequest(caller=self._identity.caller(), session_id=session_id)
        self._unary(lambda: self._stub.DeleteSession(request), gone=pb.DeleteSessionResponse())

    # ---- parts ----

    def _turn(self, request: pb.GenerateRequest) -> Turn:
        check_size(request, self.options.max_request_bytes)
        return Turn(self._stub, TurnProgress(), self._identity, self.options, request)

    def resume_progress(self, progress: TurnProgress) -> Turn:
        """Go on with a turn that this client has begun to receive."""
        return Turn(self._stub, progress, self._identity, self.options)

    def _unary(self, call: Callable[[], T], gone: T | None = None) -> T:
        """One answer; `gone` is it when an attempt whose reply was lost had already done the work."""
        patience = Patience(self.options)
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                try:
                    delay = patience.delay(error)
                except NotFoundError:
                    if gone is None or not patience.failures:
                        raise
                    return gone
            time.sleep(delay)


class Turn(TurnView):
    """One answer: iterate over its events once, or collect() it. `text` and `pcm` grow meanwhile."""

    def __init__(
        self,
        stub: KimiAudioStub,
        progress: TurnProgress,
        identity: Identity,
        options: ClientOptions,
        request: pb.GenerateRequest | None = None,
    ) -> None:
        self.progress = progress
        self._stub = stub
        self._identity = identity
        self._request = request
        self._patience = Patience(options)
        self._deadline = Deadline(options.timeout)

    def collect(self) -> Answer:
        """Everything that is left of the turn, together. Raises the turn's error."""
        for _ in self:
            pass
        return self.progress.answer()

    def __iter__(self) -> Iterator[Event]:
        """The events; the last one is TurnDone. Raises the turn's error."""
        with closing(self.events()) as events:
            for event in events:
                if isinstance(event, Ended):
                    self.progress.raise_failure()
                yield event

    def events(self) -> Generator[Event]:
        """The same, but a turn that fails or is cancelled ends with TurnFailed or TurnCancelled."""
        while self.progress.end is None:
            lost: grpc.RpcError | None = None
            stream = self._open()
            try:
                for response in stream:  # to its end: the service may still be writing down what it said
                    event = self.progress.accept(response.event)
                    if event is not None:
                        self._patience.progress()
                        yield event
            except grpc.RpcError as error:
                lost = error
            finally:
                stream.cancel()
            if self.progress.end is None:
                time.sleep(self._patience.delay(lost))

    def _open(self) -> Any:
        timeout = self._deadline.left()
        if self._request is None or self.progress.turn_id:
            return self._stub.Resume(self.progress.resume_request(self._identity.caller()), timeout=timeout)
        return self._stub.Generate(self._request, timeout=timeout)
