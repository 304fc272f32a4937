"""Triton servers for tests: a real one, where `tests/fetch_triton.sh` has unpacked it, and one in the process.

Both need `tritonclient`; a test that uses either skips without.
"""

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from kimia.hosting import FINGERPRINT, HostedModel
from tests.servers import _free_port

pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing: pip install 'kimia[triton]'")

from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".triton"
SECONDS = 300  # three Pythons import torch


# ---- the real one -----------------------------------------------------------------------------------------------


@contextmanager
def real_triton(repository: Path, log: Path) -> Iterator[str]:
    """host:port of a real server that has loaded the repository; skips where there is none."""
    servers = list(FOLDER.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    if not servers:
        pytest.skip("a real Triton is missing: run tests/fetch_triton.sh")
    [server], port = servers, _free_port()
    command = [server / "bin/tritonserver", "--model-repository", repository, "--grpc-port", str(port)]
    command += ["--backend-directory", server / "backends", "--disable-auto-complete-config"]
    command += ["--grpc-address", "127.0.0.1", "--allow-http", "false", "--allow-metrics", "false"]
    environment = os.environ | {
        "PATH": f"{FOLDER / 'bin'}:{os.environ['PATH']}",  # whose Python its backend takes
        "LD_LIBRARY_PATH": str(server.parents[1] / "nvidia_pytriton.libs"),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=log.parent, stdout=output, stderr=output)
    try:
        _wait_for(process, port, log)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


def _wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    """Its port is open when its models are loaded."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"Triton ended: {log.read_text()[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"Triton did not start within {SECONDS} s: {log.read_text()[-2000:]}")


# ---- the scripted one -------------------------------------------------------------------------------------------


class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Speaks Triton's protocol for models that are Python functions of one row."""

    def __init__(self) -> None:
        self.ready = True
        self.asked = 0  # rows
        self._functions: dict[str, Callable[..., np.ndarray]] = {}
        self.configs: dict[str, model_config_pb2.ModelConfig] = {}

    def serve(self, model: HostedModel, weights: str, function: Callable[..., np.ndarray], gives: str = "") -> None:
        """Have a model with these weights; `gives` is the datatype of what it gives."""
        config = model_config_pb2.ModelConfig(name=model.name)
        for tensor in model.takes:
            config.input.add(name=tensor.name, data_type=f"TYPE_{tensor.datatypes[0]}", dims=tensor.dims)
        datatype = gives or model.gives.datatypes[0]
        config.output.add(name=model.gives.name, data_type=f"TYPE_{datatype}", dims=model.gives.dims)
        config.parameters[FINGERPRINT].string_value = weights
        self.configs[model.name], self._functions[model.name] = config, function

    async def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=self.ready)

    async def ModelConfig(self, request, context):
        if request.name not in self.configs:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    async def ModelInfer(self, request, context):
        self.asked += 1
        given = [
            np.frombuffer(data, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
            for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True)
        ]
        try:
            row = self._functions[request.model_name](*(tensor[0] for tensor in given))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        made = service_pb2.ModelInferResponse(model_name=request.model_name, raw_output_contents=[row.tobytes()])
        name = self.configs[request.model_name].output[0].name
        made.outputs.add(name=name, datatype=np_to_triton_dtype(row.dtype), shape=[1, *row.shape])
        return made


@asynccontextmanager
async def scripted_triton(triton: ScriptedTriton, port: int = 0) -> AsyncIterator[str]:
    """host:port of a scripted server in this event loop."""
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)
        await asyncio.sleep(0)
