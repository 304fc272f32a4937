"""A small random dual-track model, its plain formulation in float64 with explicit loops, and golden prompts."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from kimia.model.config import LMConfig
from kimia.model.generate import TrackTokens
from kimia.model.lm import DualTrackLM, Row
from tests.golden_data import golden_json

BLANK, TEXT_EOS, MSG_END, MEDIA_BEGIN, MEDIA_END, PAD = 34, 35, 36, 37, 38, 39
CONFIG = LMConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    layers=4,
    heads=6,
    kv_heads=2,
    max_positions=512,
    rms_norm_eps=0.01,  # large enough to show
    rope_theta=1000.0,
    mimo_layers=2,
    fork_layer=1,
    audio_delay=3,
    token_offset=40,
    adaptor_input_dim=10,
    media_begin=MEDIA_BEGIN,
    media_end=MEDIA_END,
    pad_token=PAD,
)
WIDE = dataclasses.replace(CONFIG, hidden_size=48, intermediate_size=64)  # as the engine asks for
TOKENS = TrackTokens(
    blank=BLANK,
    text_eos=TEXT_EOS,
    audio_ends=frozenset({MSG_END, MEDIA_END}),
    token_offset=CONFIG.token_offset,
    vocabulary=CONFIG.vocab_size,
    delay=CONFIG.audio_delay,
)


def random_lm(config: LMConfig = CONFIG, seed: int = 0) -> DualTrackLM:
    """Weights of unit gain, so that every mask, norm and position shows in the result."""
    lm = DualTrackLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        scale = 1.0 if parameter.dim() == 1 or "embed" in name else 1.5 / math.sqrt(parameter.shape[-1])
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return lm.requires_grad_(False).eval()


def random_row(length: int, seed: int, segments: tuple[tuple[int, int], ...] = (), surplus: int = 1) -> Row:
    """Random ids on both tracks and random features, `surplus` frames more than each segment has codes."""
    generator = torch.Generator().manual_seed(seed)
    audio, text = torch.randint(0, CONFIG.vocab_size, (2, length), generator=generator).tolist()
    features = [torch.randn(codes + surplus, CONFIG.adaptor_input_dim, generator=generator) for _, codes in segments]
    return Row(tuple(audio), tuple(text), segments, features or None)


# ---- the plain formulation --------------------------------------------------------------------------------------


class PlainLM:
    """The network written out position by position and head by head, in float64, straight from the tensors."""

    def __init__(self, lm: DualTrackLM) -> None:
        self.config = lm.config
        self.weights = {name: tensor.double() for name, tensor in lm.state_dict().items()}
        self.kv: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # per layer, (kv_heads, T, head_dim) each

    def __call__(self, row: Row) -> dict[str, torch.Tensor]:
        config = self.config
        embeds = self.embeds(row)
        x = embeds
        for layer in range(config.fork_layer + 1):
            x = self.layer(f"model.layers.{layer}", x)
        fork = x
        for layer in range(config.fork_layer + 1, config.layers):
            x = self.layer(f"model.layers.{layer}", x)
        text = self.norm("model.norm", x)
        x = fork
        for layer in range(config.mimo_layers):
            x = self.layer(f"model.mimo_layers.{layer}", x)
        audio = self.norm("model.mimo_norm", x)
        return {
            "inputs_embeds": embeds,
            "fork_hidden": fork,
            "text_hidden": text,
            "audio_hidden": audio,
            "text_logits": text @ self.weights["lm_head.weight"].T,
            "audio_logits": audio @ self.weights["mimo_output.weight"].T,
        }

    def embeds(self, row: Row) -> torch.Tensor:
        table = self.weights["model.embed_tokens.weight"]
        heard = {}
        for (begin, codes), frames in zip(row.segments, row.features or [None] * len(row.segments), strict=True):
            for j in range(codes if frames is not None else 0):
                heard[begin + j] = self.adaptor(frames[j].double())
        positions = []
        for t, (audio_id, text_id) in enumerate(zip(row.audio_ids, row.text_ids, strict=True)):
            audio = table[audio_id]
            if t in heard:
                audio = (audio + heard[t]) * math.sqrt(2)
            positions.append(audio + table[text_id])
        return torch.stack(positions)

    def adaptor(self, frame: torch.Tensor) -> torch.Tensor:
        x = self.linear("model.vq_adaptor.layers.0", frame)
        x = self.linear("model.vq_adaptor.layers.3", x / (1 + torch.exp(-x)))
        x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + self.config.rms_norm_eps)
        return x * self.weights["model.vq_adaptor.layers.4.weight"] + self.weights["model.vq_adaptor.layers.4.bias"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x))
        y = self.norm(f"{name}.post_attention_layernorm", x)
        gate = self.linear(f"{name}.mlp.gate_proj", y)
        return x + self.linear(
            f"{name}.mlp.down_proj", gate / (1 + torch.exp(-gate)) * self.linear(f"{name}.mlp.up_proj", y)
        )

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        config, d = self.config, self.config.head_dim
        q, k, v = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        length = len(x)
        rotated = [[self.rotated(k[t, g * d : (g + 1) * d], t) for t in range(length)] for g in range(config.kv_heads)]
        values = [[v[t, g * d : (g + 1) * d] for t in range(length)] for g in range(config.kv_heads)]
        self.kv[name.removesuffix(".self_attn")] = tuple(
            torch.stack([torch.stack(head) for head in heads]) for heads in (rotated, values)
        )
        out = torch.zeros_like(q)
        for head in range(config.heads):
            group = head // (config.heads // config.kv_heads)
            for t in range(length):
                query = self.rotated(q[t, head * d : (head + 1) * d], t)
                scores = torch.stack([query @ rotated[group][s] / math.sqrt(d) for s in range(t + 1)])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                out[t, head * d : (head + 1) * d] = sum(weights[s] * values[group][s] for s in range(t + 1))
        return self.linear(f"{name}.o_proj", out)

    def rotated(self, x: torch.Tensor, position: int) -> torch.Tensor:
        half = len(x) // 2
        y = torch.empty_like(x)
        for i in range(half):
            angle = position * self.config.rope_theta ** (-2 * i / len(x))
            y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return y


# ---- golden data ------------------------------------------------------------------------------------------------


def golden_or(stage: str, name: str, absent: Any) -> Any:
    """A golden JSON file, or `absent` where the clone has none: parametrises without skipping the module."""
    try:
        return golden_json(stage, name)
    except pytest.skip.Exception:
        return absent


def runs(mask: list[int]) -> list[tuple[int, int]]:
    """(begin, length) of the stretches of ones: golden prompts give segments as a mask."""
    found: list[tuple[int, int]] = []
    for position, flag in enumerate(mask):
        if flag and found and sum(found[-1]) == position:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        elif flag:
            found.append((position, 1))
    return found
