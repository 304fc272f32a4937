"""A small random detokenizer, its plain formulations in float64 with explicit loops, and the golden cases."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kimia.model.bigvgan import BigVGAN
from kimia.model.config import FlowConfig, VocoderConfig
from kimia.model.detokenize import Detokenizer
from kimia.model.dit import DiT
from tests.golden_data import golden_json

FLOW = FlowConfig(
    mel_bins=5,
    audio_codes=11,
    hidden_size=24,
    depth=2,
    heads=3,
    mlp_hidden=40,
    position_embedding="skip",
    use_rope=True,
    rope_base=50.0,
    rope_scale=0.5,
    max_positions=400,
    max_seq_len=420,
    mel_mean=-1.5,
    mel_std=2.0,
)
VOCODER = VocoderConfig(
    mel_bins=5,
    upsample_rates=(3, 2),
    upsample_kernels=(7, 4),
    initial_channels=8,
    resblock_kernels=(3, 5),
    resblock_dilations=((1, 2), (1, 3)),
    activation="snakebeta",
    snake_logscale=True,
    bias_at_final=False,
    tanh_at_final=False,
    n_fft=16,
    hop=6,
    win=12,
    sample_rate=300,
    fmin=10.0,
    fmax=140.0,
)


def randomised(module: nn.Module, seed: int, scale: float) -> nn.Module:
    """All parameters and buffers drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return module.requires_grad_(False).eval()


def random_dit(config: FlowConfig = FLOW) -> DiT:
    dit = DiT(config)
    randomised(dit, 1, 0.2)
    return dit


def random_vocoder(config: VocoderConfig = VOCODER) -> BigVGAN:
    vocoder = BigVGAN(config)
    randomised(vocoder, 2, 0.2)
    return vocoder


def random_detokenizer(upsample: int = 4, config: FlowConfig = FLOW) -> Detokenizer:
    return Detokenizer(random_dit(config), random_vocoder(), upsample)


def counted_noise(chunk: int, shape: tuple[int, int]) -> Tensor:
    """Some noise that depends on the chunk alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + chunk))


def golden_cases(stage: str, name: str) -> list[dict[str, Any]]:
    """The cases of a golden JSON file, each with its name; none where the clone has no such set."""
    try:
        cases = golden_json(stage, name)["cases"]
    except pytest.skip.Exception:
        return []
    return [case | {"name": key} for key, case in cases.items()] if isinstance(cases, dict) else cases


# ---- the plain velocity field -----------------------------------------------------------------------------------


class PlainDiT:
    """The velocity of a chunk, frame by frame, head by head, in float64, without any cache object."""

    def __init__(self, dit: DiT) -> None:
        self.config = dit.config
        self.weights = {name: tensor.double().numpy() for name, tensor in dit.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def time(self, index: int) -> np.ndarray:
        single = np.float32  # the release's frequencies are float32, which late times magnify
        exponents = single(-math.log(10000)) * np.arange(128, dtype=single) / single(128)
        angles = (single(index) * np.exp(exponents.astype(float)).astype(single)).astype(float)
        waves = np.concatenate([np.cos(angles), np.sin(angles)])
        return self.linear("t_embedder.mlp.2", silu(self.linear("t_embedder.mlp.0", waves)))

    def turned(self, vector: np.ndarray, position: int) -> np.ndarray:
        width = self.config.head_dim
        pairs = vector[0::2] + 1j * vector[1::2]
        speeds = np.array([self.config.rope_base ** (-2 * i / width) for i in range(width // 2)])
        turned = pairs * np.exp(1j * position * self.config.rope_scale * speeds)
        return np.stack([turned.real, turned.imag], axis=1).reshape(-1)

    def attention(self, layer: int, x: np.ndarray, start: int, past: list) -> tuple[np.ndarray, list]:
        """`past` lists (key, value) of earlier frames per head; returns the output and the longer list."""
        width, heads, size = self.config.head_dim, self.config.heads, self.config.hidden_size
        qkv = self.linear(f"blocks.{layer}.attn.qkv", x)
        mixed, heard = np.zeros_like(x), []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            q, k, v = (qkv[:, part * size : (part + 1) * size][:, at] for part in range(3))
            if self.config.use_rope:
                q = np.stack([self.turned(row, start + i) for i, row in enumerate(q)])
                k = np.stack([self.turned(row, start + i) for i, row in enumerate(k)])
            keys = np.concatenate([past[head][0], k]) if past else k
            values = np.concatenate([past[head][1], v]) if past else v
            for frame, query in enumerate(q):
                scores = np.exp(keys @ query / math.sqrt(width))
                mixed[frame, at] = (scores / scores.sum()) @ values
            heard.append((keys, values))
        return self.linear(f"blocks.{layer}.attn.proj", mixed), heard

    def __call__(
        self, x: Tensor, tokens: Sequence[int], index: int, start: int, past: list | None = None
    ) -> tuple[np.ndarray, list]:
        """x (T, M), one token per frame -> velocity (T, M), and keys and values per layer and head."""
        condition = silu(self.time(index) + self.weights["semantic_token_embedding.weight"][list(tokens)])
        h = self.linear("input_linear", x.double().numpy())
        heard = []
        for layer in range(self.config.depth):
            name = f"blocks.{layer}"
            shift, scale, gate, shift2, scale2, gate2 = np.split(
                self.linear(f"{name}.adaLN_modulation.1", condition), 6, axis=1
            )
            mixed, kept = self.attention(layer, norm(h) * (1 + scale) + shift, start, past[layer] if past else [])
            heard.append(kept)
            h = h + gate * mixed
            inner = gelu_tanh(self.linear(f"{name}.mlp.fc1", norm(h) * (1 + scale2) + shift2))
            h = h + gate2 * self.linear(f"{name}.mlp.fc2", inner)
        shift, scale = np.split(self.linear("final_layer.adaLN_modulation.1", condition), 2, axis=1)
        return self.linear("final_layer.linear", norm(h) * (1 + scale) + shift), heard


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
