"""Health over a real socket, and the probe as a process."""

import asyncio
import socket
import subprocess
import sys

import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from kimia.runtime.health import Health, main, probe
from kimia.runtime.server import bind, build_server
from kimia.runtime.settings import Settings

pytestmark = pytest.mark.unit

SERVICE = "kimia.v1.LanguageModel"
SETTINGS = Settings(listen="127.0.0.1:0")
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def served():
    """(health, address) of a running server."""
    server = build_server(SETTINGS)
    health = Health(server, [SERVICE])
    address = bind(server, SETTINGS)
    await server.start()
    yield health, address
    await server.stop(None)


async def test_not_serving_until_said_and_again_when_closed(served):
    health, address = served
    for expected, change in (("NOT_SERVING", lambda: health.set(True)), ("SERVING", health.close)):
        for service in ("", SERVICE):
            assert await asyncio.to_thread(probe, address, service) == expected
        change()
    assert await asyncio.to_thread(probe, address) == "NOT_SERVING"


async def test_an_unknown_service_is_not_found(served):
    _, address = served
    assert (await asyncio.to_thread(probe, address, "kimia.v1.Other")).startswith("NOT_FOUND")


async def test_watchers_hear_of_every_change_even_when_others_leave(served):
    health, address = served
    async with grpc.aio.insecure_channel(address) as channel:
        stay, leave = (HealthStub(channel).Watch(HealthCheckRequest(service=SERVICE)) for _ in range(2))
        assert [(await watch.read()).status for watch in (stay, leave)] == [NOT_SERVING] * 2
        leave.cancel()
        health.set(True)
        assert (await stay.read()).status == SERVING
        health.close()
        assert (await stay.read()).status == NOT_SERVING
        assert await stay.read() is grpc.aio.EOF


async def test_watching_an_unknown_service_is_answered(served):
    _, address = served
    async with grpc.aio.insecure_channel(address) as channel:
        watch = HealthStub(channel).Watch(HealthCheckRequest(service="nobody"))
        assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN


async def test_watchers_do_not_keep_the_server_from_stopping():
    server = build_server(SETTINGS)
    health = Health(server, [SERVICE])
    address = bind(server, SETTINGS)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        watch = HealthStub(channel).Watch(HealthCheckRequest())
        await watch.read()
        health.close()
        await asyncio.wait_for(server.stop(grace=60), 30)


async def run_probe(*arguments):
    code = [sys.executable, "-m", "kimia.runtime.health", *arguments]
    return await asyncio.to_thread(subprocess.run, code, capture_output=True, text=True)


async def test_the_probe_is_a_command(served):
    health, address = served
    health.set(True)
    done = await run_probe(address, SERVICE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SERVING\n", "")
    health.set(False)
    assert (await run_probe(address)).returncode == 1


def test_nobody_there_is_not_healthy(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main([f"127.0.0.1:{port}"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().out


def test_wrong_usage(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
