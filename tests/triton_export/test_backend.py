"""What runs inside Triton, without Triton: rows, errors of one row, weights that have changed."""

import json

import numpy as np
import pytest
import torch

from kimia.errors import AudioError, CheckpointError
from kimia.hosting import FINGERPRINT
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import open_checkpoint
from kimia.triton_export import exported_models
from kimia.triton_export.backend import Vocoder, Vocoding, VQTokenizer, Whisper, computed

pytestmark = pytest.mark.unit


def arguments(folder, weights: str) -> dict[str, str]:
    """As Triton gives them to `initialize`."""
    told = {FINGERPRINT: weights, "model": str(folder), "vq_tokenizer": str(folder / "glm-4-voice-tokenizer")}
    config = {
        "parameters": {name: {"string_value": value} for name, value in told.items()},
        "output": [{"data_type": "TYPE_FP32"}],
    }
    return {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }


def test_rows_are_computed_as_if_each_were_alone(tiny) -> None:
    vocoder = load_vocoder(tiny / "vocoder", "cpu", torch.float32)
    mels = [np.random.default_rng(seed).standard_normal((80, 3)).astype(np.float32) for seed in range(2)]
    with torch.inference_mode():
        together = computed(Vocoding(vocoder), [(mel,) for mel in mels])
        for mel, wave in zip(mels, together, strict=True):
            assert torch.equal(wave, vocoder(torch.tensor(mel)[None])[0])


def test_a_bad_row_fails_alone() -> None:
    def network(rows):
        if any(not len(wave) for (wave,) in rows):
            raise AudioError("the waveform holds no samples")
        return [torch.tensor(len(wave)) for (wave,) in rows]

    good, bad = (np.zeros(3, np.float32),), (np.zeros(0, np.float32),)
    first, second, third = computed(network, [good, bad, good])
    assert (int(first), int(third)) == (3, 3)
    assert isinstance(second, AudioError)


def test_the_encoders_take_segments(tiny) -> None:
    exported = {model.kind: model.fingerprint for model in exported_models(open_checkpoint(tiny))}
    wave, nothing = np.zeros(8000, np.float32), np.zeros(0, np.float32)
    for kind, more in ((VQTokenizer, (np.uint8([1]),)), (Whisper, ())):
        model = kind()
        model.initialize(arguments(tiny, exported[kind.__name__]))
        row, error = computed(model._network, [(wave, *more), (nothing, *more)])
        assert len(row) == 7
        assert isinstance(error, AudioError)


def test_weights_that_are_not_those_of_the_export_are_refused(tiny) -> None:
    exported = {model.kind: model.fingerprint for model in exported_models(open_checkpoint(tiny))}
    Vocoder().initialize(arguments(tiny, exported["Vocoder"]))
    with pytest.raises(CheckpointError, match="export the repository anew"):
        Vocoder().initialize(arguments(tiny, "others"))
