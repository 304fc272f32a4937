"""A vocoder on a host gives the stage the speech that its own would."""

import asyncio

import pytest
import torch

from kimia.compute import ComputeThread
from kimia.errors import CheckpointError, StateError
from kimia.hosting import vocoder_model
from kimia.model.checkpoint import open_checkpoint
from kimia.model.detokenize import Detokenizer
from kimia.model.fingerprint import fingerprint
from kimia.pipeline import KimiAudio
from kimia.runtime.settings import Settings
from kimia.runtime.triton import TritonHost
from kimia.v1.turn_pb2 import Chunk, Step, Turn
from services.detokenizer.hosted import HostedVocoder
from services.detokenizer.stage import DetokenizerStage
from tests.golden_data import golden

pytestmark = pytest.mark.parity

CODES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.fixture
def checkpoint():
    return open_checkpoint(golden("e2e") / "model")


@pytest.fixture
async def there(model: KimiAudio, checkpoint):
    """Address of a server that has the vocoder of the model."""
    from tests.triton_server import ScriptedTriton, scripted_triton

    server = ScriptedTriton()
    vocoder = model.detokenizer.vocoder
    hosted = vocoder_model(vocoder.config.mel_bins)
    with torch.inference_mode():
        server.serve(hosted, fingerprint([checkpoint.vocoder]), lambda mel: vocoder(torch.tensor(mel)[None])[0].numpy())
        async with scripted_triton(server) as address:
            yield server, address


async def spoken(stage: DetokenizerStage) -> list[Chunk]:
    async def codes():
        for index, code in enumerate(CODES):
            yield Chunk(index=index, step=Step(code=code), final=index + 1 == len(CODES))

    return [chunk async for chunk in stage.run(Turn(seed=7), codes())]


async def test_the_same_speech(stages, there) -> None:
    server, address = there
    settings = Settings(
        model=str(golden("e2e") / "model"), device="cpu", threads=1, rows=2, engine=f"triton://{address}"
    )
    hosted = DetokenizerStage.load(settings)
    await hosted.warm_up()
    before = server.asked
    here, elsewhere = await spoken(stages["detokenizer"]), await spoken(hosted)
    assert [chunk.speech for chunk in here] == [chunk.speech for chunk in elsewhere]
    assert server.asked > before
    several = await asyncio.gather(*(spoken(hosted) for _ in range(3)))
    assert all([chunk.speech for chunk in each] == [chunk.speech for chunk in here] for each in several)
    await hosted.host.aclose()
    hosted.compute.close()
    hosted.vocoder.close()


async def test_other_weights_are_refused_before_a_turn_is_taken(there, checkpoint) -> None:
    server, address = there
    server.configs["kimia_vocoder"].parameters["fingerprint"].string_value = "others"
    vocoder = HostedVocoder.of(checkpoint, TritonHost.at(f"triton://{address}"))
    with pytest.raises(CheckpointError, match="other weights"):
        await vocoder.open()
    await vocoder._host.aclose()


async def test_a_batch_is_sent_row_by_row(there, model: KimiAudio, checkpoint) -> None:
    server, address = there
    host = TritonHost.at(f"triton://{address}")
    vocoder, thread = HostedVocoder.of(checkpoint, host), ComputeThread()
    await vocoder.open()
    mels = torch.randn(3, vocoder.config.mel_bins, 5, generator=torch.Generator().manual_seed(1))
    waves = await thread.turn().run(vocoder, mels)
    with torch.inference_mode():
        assert torch.equal(waves, torch.cat([model.detokenizer.vocoder(mel[None]) for mel in mels]))
    assert server.asked == 3
    await host.aclose()
    thread.close()


def test_not_open_yet(model: KimiAudio, checkpoint) -> None:
    vocoder = HostedVocoder.of(checkpoint, TritonHost("127.0.0.1:1"))
    with pytest.raises(StateError, match="warm up"):
        Detokenizer(model.detokenizer.dit, vocoder).vocoder(torch.zeros(1, vocoder.config.mel_bins, 4))
