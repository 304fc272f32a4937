"""Health of a process by grpc.health.v1, and the probe of containers.

    python -m kimia.runtime.health 127.0.0.1:50051 [service]     # exit code 0: serving, 1: not

NOT_SERVING until the process is ready and again as soon as it drains, before anything is refused. The probe reads the
same KIMIA_TLS_* settings as the process.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server

from kimia.errors import NotFoundError

__all__ = ["SERVICE", "Health", "probe"]

SERVICE = "grpc.health.v1.Health"
PROBE_SECONDS = 2.0

_Status: TypeAlias = Any  # HealthCheckResponse.ServingStatus, for which the stubs have no name


class Health:
    """The health of a server as a whole (the empty name) and of each of its services.

    grpcio's own asyncio servicer loses watchers of a service when another of them leaves, and keeps the server from
    stopping while anybody watches.
    """

    def __init__(self, server: grpc.aio.Server, services: Sequence[str]) -> None:
        self._status: dict[str, _Status] = dict.fromkeys(("", *services), HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Event()  # replaced at each change
        self._closed = False
        add_HealthServicer_to_server(self, server)  # type: ignore[arg-type]  # by its methods

    def set(self, serving: bool) -> None:
        """Say whether everything here serves."""
        status: _Status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        self._status = dict.fromkeys(self._status, status)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Everything is NOT_SERVING, and whoever watches is told so and let go."""
        self._closed = True
        self.set(False)

    async def Check(self, request: HealthCheckRequest, context: Any) -> HealthCheckResponse:  # noqa: ARG002
        """How a service is now."""
        if request.service not in self._status:
            raise NotFoundError(
                f"this server has no service {request.service[:100]!r}; leave the name empty for all of it"
            )
        return HealthCheckResponse(status=self._status[request.service])

    async def Watch(self, request: HealthCheckRequest, context: Any) -> AsyncIterator[HealthCheckResponse]:  # noqa: ARG002
        """How a service is now, and again whenever that changes."""
        told: _Status | None = None
        while True:
            now = self._status.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if now != told:
                told = now
                yield HealthCheckResponse(status=now)
            elif self._closed:
                return
            else:
                await self._changed.wait()


# ---- probe ------------------------------------------------------------------------------------------------------


def probe(address: str, service: str = "", *, seconds: float = PROBE_SECONDS) -> str:
    """SERVING, NOT_SERVING, or why there is no answer."""
    with _channel(address) as channel:
        try:
            check = HealthStub(channel).Check  # type: ignore[attr-defined]  # the stubs leave methods out
            answer = check(HealthCheckRequest(service=service), timeout=seconds)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return HealthCheckResponse.ServingStatus.Name(answer.status)


def _channel(address: str) -> grpc.Channel:
    """A connection as the environment's TLS settings want it: the process's own certificate shows who asks."""
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if not os.environ.get("KIMIA_TLS_CERTIFICATE"):
        return grpc.insecure_channel(address, options=options)
    from kimia.runtime.settings import read_settings

    settings = read_settings()
    chain, key = Path(settings.tls_certificate).read_bytes(), Path(settings.tls_key).read_bytes()
    authority = Path(settings.tls_client_ca).read_bytes() if settings.tls_client_ca else b""
    credentials = grpc.ssl_channel_credentials(chain + b"\n" + authority, key, chain)
    options.append(("grpc.ssl_target_name_override", settings.tls_name))
    return grpc.secure_channel(address, credentials, options=options)


def main(arguments: Sequence[str]) -> int:
    """The command; exit code 0 only for SERVING."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m kimia.runtime.health HOST:PORT [SERVICE]", file=sys.stderr)
        return 2
    answer = probe(arguments[0], *arguments[1:])
    print(answer)
    return 0 if answer == "SERVING" else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
