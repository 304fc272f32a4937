"""NVIDIA Triton as the host of a stage's networks, over gRPC.

    host = TritonHost.at("triton://10.0.0.7:8001")
    parameters = await host.open(VQ, weights)      # waits for the server; refuses other tensors or other weights
    codes = await host.infer(VQ, wave)             # one row; Triton makes batches of the rows of everybody

One row is one request, so that Triton's dynamic batching sees the rows of all processes. For one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from kimia.errors import CheckpointError, InternalError, SettingsError, UnavailableError
from kimia.hosting import FINGERPRINT, HostedModel, HostedTensor
from kimia.runtime.logs import get_logger

if TYPE_CHECKING:
    import numpy as np

SCHEME = "triton://"
ANSWER_SECONDS = 5.0  # for questions about the server
INFER_SECONDS = 60.0  # for one row, with its wait
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.1, 5.0  # between attempts to reach it
ATTEMPTS = 3  # at one row while the server cannot be reached
WATCH_SECONDS = 2.0  # between two looks at it
MISSING = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE}  # what Triton says of a model that it does not serve

log = get_logger()


class TritonHost:
    """One Triton server. The connection is made when it is first needed."""

    def __init__(self, address: str) -> None:
        """`address` is host:port of its gRPC service."""
        self.address = address
        self._made: Any = None

    @classmethod
    def at(cls, engine: str) -> TritonHost:
        """The host that the setting KIMIA_ENGINE names. Raises SettingsError without the client library."""
        try:
            import tritonclient.grpc.aio  # noqa: F401
        except ImportError as error:
            raise SettingsError(
                "KIMIA_ENGINE: Triton needs its client library; pip install 'kimia[triton]', or unset KIMIA_ENGINE to "
                "compute in the process"
            ) from error
        return cls(engine.removeprefix(SCHEME))

    @property
    def _client(self) -> Any:
        if self._made is None:
            from tritonclient.grpc.aio import InferenceServerClient

            self._made = InferenceServerClient(self.address)
        return self._made

    async def aclose(self) -> None:
        """End the connection."""
        if self._made is not None:
            await self._made.close()
            self._made = None

    # ---- is it there, and is it the right one ----

    async def open(self, model: HostedModel, weights: str) -> str:
        """Wait until the server answers and serves the model; the datatype of what it gives.

        Raises CheckpointError when the server lacks the model, has it with other tensors, or with weights of another
        fingerprint than `weights`.
        """
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                if await self._answers():
                    return await self._checked(model, weights)
            except UnavailableError as error:
                log.warning("waiting for triton", error=str(error), retry_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    async def alive(self) -> bool:
        """Whether the server answers now."""
        try:
            return await self._answers()
        except UnavailableError:
            return False

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Tell whenever the server falls silent or answers again; for ever."""
        before = True
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = await self.alive()
            if now != before:
                log.warning("triton answers again" if now else "triton does not answer", address=self.address)
                tell(now)
                before = now

    async def _answers(self) -> bool:
        """Whether it has loaded its models. Raises UnavailableError when it cannot be reached."""
        async with self._asked():
            return bool(await self._client.is_server_ready(client_timeout=ANSWER_SECONDS))

    async def _checked(self, model: HostedModel, weights: str) -> str:
        advice = f"write its repository with `kimia triton export` and have Triton load {model.name}"
        try:
            answer = await self._client.get_model_config(model.name, client_timeout=ANSWER_SECONDS)
        except _exception() as error:
            if _code(error) in MISSING and await self._answers():
                raise CheckpointError(f"Triton at {self.address} serves no model {model.name}; {advice}") from error
            raise self._error(error) from error
        config = answer.config
        self._check_tensors(model, model.takes, config.input)
        self._check_tensors(model, (model.gives,), config.output)
        served = config.parameters[FINGERPRINT].string_value if FINGERPRINT in config.parameters else ""
        if served != weights:
            raise CheckpointError(
                f"{model.name} at {self.address} has other weights (fingerprint {served or 'missing'}) than this "
                f"process's checkpoint ({weights}); name the same checkpoint here, or {advice}"
            )
        return _datatype(config.output[0])

    def _check_tensors(self, model: HostedModel, wanted: Sequence[HostedTensor], found: Iterable[Any]) -> None:
        there = {tensor.name: (_datatype(tensor), tuple(tensor.dims)) for tensor in found}
        fits = [there.get(one.name) in [(datatype, one.dims) for datatype in one.datatypes] for one in wanted]
        if len(there) != len(wanted) or not all(fits):
            needed = {one.name: (" or ".join(one.datatypes), one.dims) for one in wanted}
            raise CheckpointError(
                f"{model.name} at {self.address} has the tensors {there}, needed are {needed}; "
                "write its repository anew with `kimia triton export`"
            )

    # ---- computing ----

    async def infer(self, model: HostedModel, *row: np.ndarray) -> np.ndarray:
        """What the model gives for one row, its tensors in order, without the dimension of the batch.

        Raises UnavailableError when the server cannot be reached, InternalError for what it refuses.
        """
        from tritonclient.grpc import InferInput, InferRequestedOutput

        given = [
            InferInput(tensor.name, [1, *values.shape], tensor.datatypes[0])
            for tensor, values in zip(model.takes, row, strict=True)
        ]
        for tensor, values in zip(given, row, strict=True):
            tensor.set_data_from_numpy(values[None])
        wanted = [InferRequestedOutput(model.gives.name)]
        pause = FIRST_RETRY_SECONDS
        for left in reversed(range(ATTEMPTS)):
            try:
                async with self._asked():
                    result = await self._client.infer(model.name, given, outputs=wanted, client_timeout=INFER_SECONDS)
                return self._row(model, result.as_numpy(model.gives.name))
            except UnavailableError:
                if not left:
                    raise
            await asyncio.sleep(pause)
            pause = 4 * pause
        raise AssertionError("the last attempt returns or raises")

    def _row(self, model: HostedModel, given: np.ndarray | None) -> np.ndarray:
        if given is None or given.ndim != 1 + len(model.gives.dims) or len(given) != 1:
            shape = None if given is None else given.shape
            raise InternalError(f"{model.name} at {self.address} gave {model.gives.name} of the shape {shape}")
        row: np.ndarray = given[0]
        return row

    # ---- errors ----

    @contextlib.asynccontextmanager
    async def _asked(self) -> AsyncIterator[None]:
        try:
            yield
        except _exception() as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> UnavailableError | InternalError:
        code, said = _code(error), str(error)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return UnavailableError(
                f"Triton at {self.address} cannot be reached; check KIMIA_ENGINE and that it runs ({said})",
                retry_after=LONGEST_RETRY_SECONDS,
            )
        return InternalError(f"Triton at {self.address} refused: {said}")


def _exception() -> type[Exception]:
    from tritonclient.utils import InferenceServerException

    kind: type[Exception] = InferenceServerException
    return kind


def _code(error: Any) -> grpc.StatusCode | None:
    """The library keeps a status as text, `StatusCode.UNAVAILABLE`."""
    name = str(error.status() or "").removeprefix("StatusCode.")
    return grpc.StatusCode.__members__.get(name)


def _datatype(tensor: Any) -> str:
    """`FP32` of a tensor in a model's config, which says TYPE_FP32."""
    name: str = type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    return name.removeprefix("TYPE_")
