"""Starting weights of networks that kimia.model builds empty."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LONGEST_PERIOD = 10000.0


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's position table, (length, width): sines, then cosines."""
    rates = torch.exp(-math.log(LONGEST_PERIOD) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Fill every layer of an encoder: linear and convolution by fan-in, norms as identity, positions as sinusoids."""
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            if name.endswith("embed_positions"):
                layer.weight.copy_(sinusoids(*layer.weight.shape))
            else:
                nn.init.normal_(layer.weight, std=0.02)
