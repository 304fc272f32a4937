import asyncio
import os
import signal
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from kimia.errors import CapacityError
from kimia.status import from_rpc_error
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub
from tests.orchestrator.world import asks

pytestmark = pytest.mark.unit


def test_the_control_plane_needs_no_torch():
    code = "import sys, orchestrator.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
async def process(valkey_url, tmp_path):
    """A running orchestrator: (process, address)."""
    ready = tmp_path / "ready"
    environment = {
        **os.environ,
        "KIMIA_REDIS_URL": valkey_url,
        "KIMIA_LISTEN": "127.0.0.1:0",
        "KIMIA_READY_FILE": str(ready),
        "KIMIA_DRAIN_SECONDS": "5",
    }
    started = await asyncio.create_subprocess_exec(sys.executable, "-m", "orchestrator", env=environment)
    async with asyncio.timeout(30):
        while not ready.exists():
            assert started.returncode is None
            await asyncio.sleep(0.01)
    yield started, ready.read_text().strip()
    if started.returncode is None:
        started.kill()
        await started.wait()


async def test_the_process_serves_and_drains(process):
    started, address = process
    async with grpc.aio.insecure_channel(address) as channel:
        health = await HealthStub(channel).Check(HealthCheckRequest(service="kimia.v1.KimiAudio"))
        assert health.status == 1
        with pytest.raises(grpc.RpcError) as caught:
            async for _ in KimiAudioStub(channel).Generate(pb.GenerateRequest(messages=[asks()])):
                pass
        assert isinstance(from_rpc_error(caught.value), CapacityError)
    started.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        assert await started.wait() == 0
