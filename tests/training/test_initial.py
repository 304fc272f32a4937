"""Starting weights."""

import pytest
import torch
from torch import nn

from kimia.model.vq import VQTokenizer
from training.initial import initialise, sinusoids

pytestmark = pytest.mark.unit


def test_every_weight_of_an_empty_encoder_is_filled(configs):
    tokenizer = VQTokenizer(configs.vq, configs.vq_features).to_empty(device="cpu")
    for parameter in tokenizer.parameters():
        nn.init.constant_(parameter, torch.nan)
    initialise(tokenizer)
    assert all(torch.isfinite(parameter).all() for parameter in tokenizer.parameters())


def test_positions_are_sines_then_cosines():
    table = sinusoids(8, 6)
    assert table.shape == (8, 6)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(table[1, 0], torch.tensor(1.0).sin())
