"""What quantisation costs: the numbers of the report, on weights whose loss is known and on checkpoints."""

import math

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.quantize import SCHEMES
from kimia.pipeline import KimiAudio
from kimia.verify.quantized import GREETINGS, TrackLoss, _compared, measure

pytestmark = pytest.mark.parity


def test_errors_divergence_and_agreement_are_those_of_the_definitions() -> None:
    exact = [torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([[5.0, 0.0]])]
    near = [torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]]), torch.tensor([[5.0, 0.0]])]
    loss = _compared("text", exact, near)
    apart = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # (1/2, 1/2) from (1/4, 3/4)
    assert loss.positions == 3
    assert loss.largest_error == pytest.approx(math.log(3))
    assert loss.mean_error == pytest.approx(math.log(3) / 6)
    assert loss.mean_divergence == pytest.approx(apart / 3)
    assert loss.largest_divergence == pytest.approx(apart)
    assert loss.agreeing == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_of_random_weights(scheme, tiny) -> None:
    model = KimiAudio(tiny, load_detokenizer=False, device="cpu")
    loss = measure(model, scheme, examples=tiny)  # it has none
    assert "two greetings" in str(loss)
    text, audio = loss.tracks
    assert text.positions >= len(GREETINGS)
    assert audio.positions > 0
    for track in loss.tracks:
        assert 0 < track.mean_error < track.largest_error
        assert 0 < track.mean_divergence <= track.largest_divergence
        assert 0 < track.agreeing <= track.positions
    assert loss.bytes_after < loss.bytes_before
    again = KimiAudio(tiny, load_detokenizer=False, device="cpu", quantize=scheme)
    assert type(again.lm.lm_head.weight) is type(model.lm.lm_head.weight)  # what was measured is what is served
    assert torch.equal(again.lm.mimo_output.weight.dequantize(), model.lm.mimo_output.weight.dequantize())


def test_a_track_that_is_never_drawn_is_said_to_be_so() -> None:
    assert str(TrackLoss("audio", 0, 0.0, 0.0, 0.0, 0.0, 0)) == "audio  never drawn"


def test_nothing_to_measure_without_a_scheme(tiny) -> None:
    model = KimiAudio(tiny, load_detokenizer=False, device="cpu")
    with pytest.raises(ParameterError, match="one of int8, fp8"):
        measure(model, "int4")
