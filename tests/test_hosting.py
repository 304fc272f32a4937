"""What is agreed with a server fits what the networks take and give."""

import pytest

from kimia.hosting import VQ, vocoder_model, whisper_model

pytestmark = pytest.mark.unit


def test_names_are_those_of_the_repository() -> None:
    names = [model.name for model in (VQ, whisper_model(128), vocoder_model(80))]
    assert names == ["kimia_vq", "kimia_whisper", "kimia_vocoder"]


def test_dimensions_are_those_of_the_checkpoint() -> None:
    assert whisper_model(128).gives.dims == (-1, 128)
    assert [tensor.dims for tensor in vocoder_model(80).takes] == [(80, -1)]
