"""The client of a Triton server, against a server in this process that speaks its protocol."""

import asyncio
import sys

import numpy as np
import pytest

from kimia.errors import CheckpointError, InternalError, SettingsError, UnavailableError
from kimia.hosting import VQ, vocoder_model, whisper_model
from kimia.runtime import triton
from kimia.runtime.triton import TritonHost
from tests.servers import _free_port

pytestmark = pytest.mark.unit

VOCODER = vocoder_model(2)


@pytest.fixture
async def there():
    """(scripted server, host connected to it)."""
    from tests.triton_server import ScriptedTriton, scripted_triton

    server = ScriptedTriton()
    server.serve(VQ, "weights", lambda wave, whole: np.int64([len(wave), whole[0]]))
    server.serve(VOCODER, "weights", lambda mel: mel.sum(0))
    async with scripted_triton(server) as address:
        host = TritonHost.at(f"triton://{address}")
        yield server, host
        await host.aclose()


def test_without_its_library_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.aio", None)
    with pytest.raises(SettingsError, match=r"pip install 'kimia\[triton\]'"):
        TritonHost.at("triton://127.0.0.1:1")


async def test_rows_go_there_and_come_back(there) -> None:
    _, host = there
    assert await host.open(VQ, "weights") == "INT64"
    assert await host.open(VOCODER, "weights") == "FP32"
    wave, mel = np.zeros(7, np.float32), np.float32([[1, 2, 3], [4, 5, 6]])
    codes, sound = await asyncio.gather(host.infer(VQ, wave, np.uint8([1])), host.infer(VOCODER, mel))
    assert codes.tolist() == [7, 1]
    assert sound.tolist() == [5, 7, 9]


async def test_features_in_half_precision(there) -> None:
    server, host = there
    import ml_dtypes

    features = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    model = whisper_model(3)
    server.serve(model, "weights", lambda wave: features, gives="BF16")
    assert await host.open(model, "weights") == "BF16"
    made = await host.infer(model, np.zeros(7, np.float32))
    assert made.view(np.uint16).tolist() == features.view(np.uint16).tolist()


async def test_a_model_that_is_not_there(there) -> None:
    _, host = there
    with pytest.raises(CheckpointError, match=r"serves no model kimia_whisper; write .*kimia triton export"):
        await host.open(whisper_model(8), "weights")


async def test_other_tensors(there) -> None:
    server, host = there
    server.serve(vocoder_model(3), "weights", lambda mel: mel)
    with pytest.raises(CheckpointError, match=r"has the tensors .*\(3, -1\).* needed are .*\(2, -1\).* anew with"):
        await host.open(VOCODER, "weights")
    config = server.configs[VQ.name]
    config.input.pop()
    with pytest.raises(CheckpointError, match="WHOLE"):
        await host.open(VQ, "weights")


async def test_other_weights(there) -> None:
    server, host = there
    with pytest.raises(CheckpointError, match=r"other weights \(fingerprint weights\).*\(mine\).*kimia triton export"):
        await host.open(VQ, "mine")
    del server.configs[VQ.name].parameters["fingerprint"]
    with pytest.raises(CheckpointError, match="fingerprint missing"):
        await host.open(VQ, "mine")


async def test_what_it_refuses_is_told_and_not_tried_again(there) -> None:
    server, host = there

    def refuse(wave, whole):
        raise ValueError("the waveform holds no samples")

    server.serve(VQ, "weights", refuse)
    with pytest.raises(InternalError, match=r"refused: .*the waveform holds no samples"):
        await host.infer(VQ, np.zeros(0, np.float32), np.uint8([1]))
    assert server.asked == 1


async def test_another_shape_than_was_agreed(there) -> None:
    server, host = there
    server.serve(VOCODER, "weights", lambda mel: mel)
    with pytest.raises(InternalError, match=r"gave WAVE of the shape \(1, 2, 3\)"):
        await host.infer(VOCODER, np.zeros((2, 3), np.float32))


async def test_it_is_waited_for(there, monkeypatch) -> None:
    server, _ = there
    from tests.triton_server import scripted_triton

    monkeypatch.setattr(triton, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(triton, "LONGEST_RETRY_SECONDS", 0.01)
    port = _free_port()
    host = TritonHost(f"127.0.0.1:{port}")
    opening = asyncio.create_task(host.open(VQ, "weights"))
    await asyncio.sleep(0.05)
    server.ready = False  # it answers, but its models are not loaded yet
    async with scripted_triton(server, port):
        await asyncio.sleep(0.05)
        assert not opening.done()
        server.ready = True
        assert await opening == "INT64"
        await host.aclose()


async def test_gone_while_it_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(triton, "FIRST_RETRY_SECONDS", 0.001)
    pytest.importorskip("tritonclient")
    host = TritonHost(f"127.0.0.1:{_free_port()}")
    with pytest.raises(UnavailableError, match=r"cannot be reached; check KIMIA_ENGINE and that it runs") as caught:
        await host.infer(VOCODER, np.zeros((2, 3), np.float32))
    assert caught.value.retry_after
    await host.aclose()


async def test_watching_tells_changes_only(there, monkeypatch) -> None:
    server, host = there
    monkeypatch.setattr(triton, "WATCH_SECONDS", 0.001)
    told: asyncio.Queue[bool] = asyncio.Queue()
    watching = asyncio.create_task(host.watch(told.put_nowait))
    await asyncio.sleep(0.05)
    assert told.empty()
    server.ready = False
    assert await told.get() is False
    server.ready = True
    assert await told.get() is True
    watching.cancel()
