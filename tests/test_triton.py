"""A real Triton server on the repository that kimia writes gives what the process itself computes."""

import asyncio

import numpy as np
import pytest
import torch

from kimia.errors import InternalError
from kimia.model.audio import Segment
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import open_checkpoint
from kimia.model.encode import AudioEncoder
from kimia.runtime.triton import TritonHost
from kimia.triton_export import Batching, export, exported_models
from tests.golden_data import golden
from tests.triton_server import real_triton

pytestmark = [pytest.mark.parity, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(golden("e2e") / "model")


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    export(checkpoint, folder / "repository", torch.device("cpu"), torch.bfloat16, Batching(rows=4))
    with real_triton(folder / "repository", folder / "log") as found:
        yield found


@pytest.fixture
async def host(address, checkpoint):
    host = TritonHost.at(f"triton://{address}")
    yield host
    await host.aclose()


async def test_the_encoders(host, checkpoint) -> None:
    """Codes to the digit and features to the bit, of whole recordings and of segments, whoever is beside them."""
    vq, whisper, _ = exported_models(checkpoint)
    assert await host.open(vq.hosted, vq.fingerprint) == "INT64"
    assert await host.open(whisper.hosted, whisper.fingerprint) == "BF16"
    encoder = AudioEncoder.load(checkpoint, whisper.hosted.gives.dims[1], "cpu", torch.bfloat16)
    rng = np.random.default_rng(1)
    waves = [rng.standard_normal(length).astype(np.float32) / 10 for length in (8000, 17000, 500, 16000)]
    segments = [Segment(wave, whole=length != 3) for length, wave in enumerate(waves)]
    asked = [host.infer(vq.hosted, one.samples, np.uint8([one.whole])) for one in segments]
    codes = await asyncio.gather(*asked)
    features = await asyncio.gather(*(host.infer(whisper.hosted, one.samples) for one in segments))
    for segment, ids, rows in zip(segments, codes, features, strict=True):
        [own] = encoder.encode_segments([segment])
        assert tuple(ids) == own.codes
        assert np.array_equal(rows.view(np.uint16), own.features.view(torch.uint16).numpy())
    with pytest.raises(InternalError, match=r"refused: .*no samples"):
        await host.infer(whisper.hosted, waves[0][:0])


async def test_the_vocoder(host, checkpoint) -> None:
    *_, exported = exported_models(checkpoint)
    assert await host.open(exported.hosted, exported.fingerprint) == "FP32"
    rng = np.random.default_rng(1)
    bins = exported.hosted.takes[0].dims[0]
    mels = [rng.standard_normal((bins, frames)).astype(np.float32) for frames in (9, 9, 24, 9)]
    waves = await asyncio.gather(*(host.infer(exported.hosted, mel) for mel in mels))
    vocoder = load_vocoder(checkpoint.vocoder, "cpu", torch.float32)
    with torch.inference_mode():
        for mel, wave in zip(mels, waves, strict=True):
            assert np.array_equal(wave, vocoder(torch.tensor(mel)[None])[0].numpy())
    with pytest.raises(InternalError, match=r"refused: .*unexpected shape"):
        await host.infer(exported.hosted, mels[0][1:])
