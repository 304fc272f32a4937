"""The velocity field as a solve needs it: the numbers of `kimia.model.dit` from fewer and larger operations.

The plain layers of `DiT` say what is computed. Here the modulations of all layers come from one matrix product, of
several time steps at once where few tokens are solved (their weights are a third of the model, read once instead of
once a step); queries and keys are turned in one complex product; scaling, shifting and gating are one operation each.
The fused matrix takes the place of its parts, which become views of it: no weight is stored twice.

Shapes: T mel frames, n tokens, r frames per token, M mel bins, D width, H heads, d head width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.dit import NORM_EPS, Block, Chunk, DiT, Packed
from kimia.model.fused import fuse

MODULATED_ROWS = 512  # tokens times steps of one product of modulations; more make it no faster
PARTS = 6  # shift, scale, gate of attention; the same of the MLP


class FusedDiT:
    """One evaluation of chunks with one batch row each. Inference only."""

    def __init__(self, dit: DiT) -> None:
        self._dit = dit
        self._width = dit.config.hidden_size
        self._blocks = [block for block in dit.blocks if isinstance(block, Block)]
        modulations = [block.adaLN_modulation for block in self._blocks] + [dit.final_layer.adaLN_modulation]
        linears = [part[1] for part in modulations if isinstance(part[1], nn.Linear)]
        self._weight, self._bias = fuse(*linears), torch.cat([linear.bias for linear in linears])

    def modulate(self, times: Tensor, tokens: Tensor) -> Tensor:
        """Modulations of embedded tokens (n, D) at embedded times (S, 1 or n, D): (S, n, 6 L + 2, D).

        Each layer's six, as its weights order them, with 1 added to the scales; then shift and scale of the last.
        """
        condition = F.silu(times + tokens)
        made = F.linear(condition.flatten(0, 1), self._weight, self._bias)
        parts = made.view(*condition.shape[:2], -1, self._width)
        parts[:, :, 1::3].add_(1)
        return parts

    def __call__(self, x: Tensor, modulation: Tensor, chunk: Chunk | Packed) -> Tensor:
        """Velocity at x (T, M) under the modulation (n, 6 L + 2, D) of one step. -> (T, M)

        The chunk's keys and values of every layer are written at the end of its cache.
        """
        dit, width = self._dit, self._width
        parts = iter(modulation[:, :, None].unbind(1))  # each (n, 1, D)
        h = F.linear(x.to(dit.dtype), dit.input_linear.weight, dit.input_linear.bias)
        if chunk.position is not None:
            h = h + chunk.position
        h = h.view(-1, chunk.repeat, width)  # (n, r, D)
        for layer, block in enumerate(self._blocks):
            h = _through(block, h, parts, chunk, layer)
        last = dit.final_layer.linear
        return F.linear(_modulated(h, parts).view(-1, width), last.weight, last.bias)


def _modulated(h: Tensor, parts: Iterator[Tensor]) -> Tensor:
    """Takes shift and scale from the parts."""
    return torch.addcmul(next(parts), F.layer_norm(h, h.shape[-1:], eps=NORM_EPS), next(parts))


def _through(block: Block, h: Tensor, parts: Iterator[Tensor], chunk: Chunk | Packed, layer: int) -> Tensor:
    """One block: h (n, r, D) -> (n, r, D)."""
    width = h.shape[-1]
    attn, mlp = block.attn, block.mlp
    qkv = F.linear(_modulated(h, parts).view(-1, width), attn.qkv.weight, attn.qkv.bias)
    mixed = _attend(qkv, attn.heads, chunk, layer)
    h = torch.addcmul(h, next(parts), F.linear(mixed, attn.proj.weight, attn.proj.bias).view_as(h))
    inner = F.gelu(F.linear(_modulated(h, parts).view(-1, width), mlp.fc1.weight, mlp.fc1.bias), approximate="tanh")
    return torch.addcmul(h, next(parts), F.linear(inner, mlp.fc2.weight, mlp.fc2.bias).view_as(h))


def _attend(qkv: Tensor, heads: int, chunk: Chunk | Packed, layer: int) -> Tensor:
    """Projections (T, 3 D) -> (T, D)."""
    qkv = qkv.view(len(qkv), 3, heads, -1)
    if chunk.turning is not None:
        _turn(qkv[:, :2], chunk.turning)
    q, k, v = qkv.permute(1, 2, 0, 3)[:, None].unbind()  # each (1, H, T, d)
    return chunk.attend(layer, q, k, v).transpose(1, 2).reshape(len(qkv), -1)


def _turn(qk: Tensor, turning: Tensor) -> None:
    """Rotate neighbouring pairs of qk (T, 2, H, d) in place, in float32, by (T, 1, 1, d / 2) complex numbers."""
    wide = qk.float()
    pairs = torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2))
    if qk.dtype == torch.float32:
        pairs.mul_(turning)  # a view of qk
    else:
        qk.copy_(torch.view_as_real(pairs * turning).flatten(-2))
