"""Encoders on a host give the stage what its own would, in the same chunks."""

import asyncio

import numpy as np
import pytest
import torch

from kimia.errors import CheckpointError, InternalError
from kimia.hosting import VQ
from kimia.model.audio import Segment
from kimia.model.checkpoint import open_checkpoint
from kimia.pipeline import KimiAudio
from kimia.runtime.settings import Settings
from kimia.triton_export import exported_models
from services.tokenizer.stage import TokenizerStage
from tests.golden_data import golden
from tests.services.tokenizer.test_stage import QUESTION, heard, ran, sound_log, turn

pytestmark = pytest.mark.parity


@pytest.fixture
async def there(model: KimiAudio):
    """(scripted server with the encoders of the model, stage that computes there)."""
    from tests.triton_server import ScriptedTriton, scripted_triton

    server = ScriptedTriton()
    vq, whisper, _ = exported_models(open_checkpoint(golden("e2e") / "model"))
    encoder = model.encoder

    def codes(wave, whole):
        with torch.inference_mode():
            return encoder.vq.encode_segments([Segment(wave, bool(whole[0]))])[0].numpy()

    def features(wave):
        with torch.inference_mode():
            return encoder.whisper.encode_segments([Segment(wave, True)])[0].numpy()

    server.serve(vq.hosted, vq.fingerprint, codes)
    server.serve(whisper.hosted, whisper.fingerprint, features)
    async with scripted_triton(server) as address:
        settings = Settings(model=str(golden("e2e") / "model"), device="cpu", threads=1, engine=f"triton://{address}")
        stage = TokenizerStage.load(settings)
        yield server, stage
        await stage.host.aclose()
        stage.compute.close()


async def test_the_same_codes_and_features(there, stages) -> None:
    _, stage = there
    await stage.warm_up()
    log = sound_log(QUESTION.read_bytes())
    here, elsewhere = await ran(stages["tokenizer"], turn([heard()]), log), await ran(stage, turn([heard()]), log)
    assert [chunk.encoded for chunk in here] == [chunk.encoded for chunk in elsewhere]
    plain = Settings(model=str(golden("e2e") / "model"), device="cpu", threads=1)
    own = TokenizerStage.load(plain)
    assert stage.fingerprint == own.fingerprint  # one reads the features that the other has made
    own.compute.close()


async def test_another_checkpoint_there(there) -> None:
    server, stage = there
    server.configs["kimia_whisper"].parameters["fingerprint"].string_value = "others"
    with pytest.raises(CheckpointError, match=r"kimia_whisper .* has other weights"):
        await stage.warm_up()


async def test_as_many_positions_as_the_sound_has(there) -> None:
    server, stage = there
    [config] = (config for name, config in server.configs.items() if name == VQ.name)
    server.serve(VQ, config.parameters["fingerprint"].string_value, lambda wave, whole: np.zeros(3, np.int64))
    with pytest.raises(InternalError, match=r"kimia_vq gave 3 positions for 32000 samples|for 16000 samples"):
        await stage.warm_up()


async def test_who_waits_no_more_is_not_waited_for(there) -> None:
    _, stage = there
    await stage.encoder.open()
    jobs = stage.encoder.submit([Segment(np.zeros(16000, np.float32), True)] * 2, heard=True)
    stage.encoder.withdraw(jobs)
    await asyncio.sleep(0)
    assert all(job.encoded.cancelled() for job in jobs)
