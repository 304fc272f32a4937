"""The flow-matching transformer (DiT): noisy mel frames and semantic tokens in, velocity out.

A chunk attends fully to itself and to the keys and values of earlier chunks, its prefix; there is no mask and no
causality. Every token stands for `repeat` mel frames that share one modulation (shift, scale, gate), so modulation is
computed per token and broadcast to its frames; `repeat=1` with repeated tokens is the plain twin.

Shapes: B batch, n tokens, r repeat, T = n * r frames, P prefix frames, M mel bins, D width, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.attention import Visible, attention
from kimia.model.checkpoint import ARCHIVE, SINGLE_FILE, Source, load_strict, safetensors_source, torch_source
from kimia.model.config import FlowConfig
from kimia.model.layout import FLOW_PREFIX, TIME_FEATURES

LONGEST_PERIOD = 10000.0  # of the time and position sinusoids
NORM_EPS = 1e-6

Rotation = tuple[Tensor, Tensor]  # cosines and sines (T, d / 2), float32


# ---- what one conversation keeps, and what one chunk fixes ------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """Keys (after RoPE) and values of all layers: what a conversation has heard so far."""

    keys: Tensor  # (layers, B, H, P, d)
    values: Tensor  # (layers, B, H, P, d)

    @property
    def frames(self) -> int:
        """Mel frames remembered."""
        return self.keys.shape[3]

    def with_room(self, frames: int) -> Prefix:
        """A copy with `frames` more rows, unfilled, that a forward pass writes: made once per chunk, not per step."""
        return Prefix(_with_room(self.keys, frames), _with_room(self.values, frames))

    def span(self, start: int, stop: int) -> Prefix:
        """A view of the frames start..stop-1."""
        return Prefix(self.keys[..., start:stop, :], self.values[..., start:stop, :])

    def copy_(self, other: Prefix) -> None:
        """Become another of as many frames."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)


def _with_room(held: Tensor, frames: int) -> Tensor:
    layers, batch, heads, length, width = held.shape
    roomy = held.new_empty(layers, batch, heads, length + frames, width)
    roomy[..., :length, :] = held
    return roomy


@dataclass(frozen=True)
class Chunk:
    """What stays the same through all ODE steps of a chunk, gathered once."""

    tokens: Tensor  # (B, n, D) embedded semantic tokens
    repeat: int  # mel frames per token
    rotation: Rotation | None
    position: Tensor | None  # (T, D) position embedding, where the model has one
    cache: Prefix  # the prefix, then T rows that each forward pass overwrites

    @cached_property
    def visible(self) -> Visible:
        """Every frame sees the whole prefix and the whole chunk."""
        batch, tokens = self.tokens.shape[:2]
        return Visible(
            lengths=(self.cache.frames,) * batch,
            queries=tokens * self.repeat,
            causal=False,
            device=self.tokens.device,
        )

    @cached_property
    def turning(self) -> Tensor | None:
        """The rotation as complex numbers (T, 1, 1, d / 2)."""
        return None if self.rotation is None else torch.complex(*self.rotation)[:, None, None]

    @cached_property
    def places(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each layer: all keys, all values, and of both what the chunk itself writes."""
        layers = zip(self.cache.keys, self.cache.values, strict=True)
        return [(keys, values, keys[:, :, -self.frames :], values[:, :, -self.frames :]) for keys, values in layers]

    @property
    def frames(self) -> int:
        """Mel frames of the chunk itself: T."""
        return self.tokens.shape[1] * self.repeat

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write a layer's keys and values at the end of its cache and attend; each (B, H, T, d)."""
        keys, values, own_keys, own_values = self.places[layer]
        own_keys.copy_(k)
        own_values.copy_(v)
        return attention(q, keys, values, self.visible)

    def head(self, count: int) -> Chunk:
        """Its first `count` tokens; the cache is shared."""
        frames = count * self.repeat
        start = self.cache.frames - self.frames
        return replace(
            self,
            tokens=self.tokens[:, :count],
            rotation=None if self.rotation is None else (self.rotation[0][:frames], self.rotation[1][:frames]),
            position=None if self.position is None else self.position[:frames],
            cache=self.cache.span(0, start + frames),
        )


class Packed:
    """Chunks of several conversations behind one another in one row of frames, each with its own prefix.

    Everything but attention works frame by frame, so that no frame is padding; attention runs once per chunk. The
    chunks have one batch row each, and the same `repeat`.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.repeat = chunks[0].repeat
        self.frames = [chunk.frames for chunk in chunks]
        self.tokens = torch.cat([chunk.tokens for chunk in chunks], 1)  # (1, n, D)
        rotations = [chunk.rotation for chunk in chunks if chunk.rotation is not None]
        positions = [chunk.position for chunk in chunks if chunk.position is not None]
        cosines, sines = zip(*rotations, strict=True) if rotations else ((), ())
        self.rotation = (torch.cat(cosines), torch.cat(sines)) if rotations else None
        self.turning = torch.complex(*self.rotation)[:, None, None] if self.rotation else None
        self.position = torch.cat(positions) if positions else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Chunk.attend, of all chunks: (1, H, T, d) with T frames of all."""
        parts = zip(self.chunks, *(torch.split(heads, self.frames, 2) for heads in (q, k, v)), strict=True)
        return torch.cat([chunk.attend(layer, *part) for chunk, *part in parts], 2)


# ---- time and positions -----------------------------------------------------------------------------------------


def time_sinusoid(times: Tensor) -> Tensor:
    """Sinusoids of diffusion times in 0..1000, cosines first. (N,) -> (N, 256) float32."""
    half = TIME_FEATURES // 2
    exponents = -math.log(LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32) / half
    # Processors round a float32 exp differently, which time 1000 magnifies; a float64 one is rounded alike everywhere.
    angles = times.float()[:, None] * exponents.double().exp().float().to(times.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary(config: FlowConfig, start: int, frames: int, device: torch.device) -> Rotation | None:
    """Cosines and sines of absolute positions start..start+frames-1, (T, d / 2); None without `use_rope`."""
    if not config.use_rope:
        return None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    positions = torch.arange(start, start + frames, dtype=torch.float32) * config.rope_scale
    angles = positions[:, None] * (1.0 / torch.pow(config.rope_base, exponents.double()).float())  # as time_sinusoid
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the interleaved pairs (2i, 2i+1) of the last dimension, in float32. (..., T, d) -> (..., T, d)."""
    cos, sin = rotation
    x32 = x.float()
    even, odd = x32[..., 0::2], x32[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class SinusoidalPosition(nn.Module):
    """The release's "sincos" embedding: sines, then cosines, of the rank inside the chunk, not of the position.

    Position 0 counts as padding: it gets zeros, and ranks start at 1 behind it.
    """

    _float_tensor: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("_float_tensor", torch.empty(1))  # in the file; says nothing

    def forward(self, positions: Tensor) -> Tensor:
        """(T,) -> (T, D)."""
        present = positions != 0
        ranks = present.cumsum(0)[:, None]
        half = self.width // 2
        steps = torch.arange(half, device=positions.device, dtype=torch.float32)
        angles = ranks * torch.exp(steps * -(math.log(LONGEST_PERIOD) / (half - 1)))
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return F.pad(waves, (0, self.width % 2)) * present[:, None]


# ---- the network ------------------------------------------------------------------------------------------------


class TimeEmbedder(nn.Module):
    """Sinusoids through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """(N,) -> (N, D)."""
        return self.mlp(time_sinusoid(times).to(next(self.parameters()).dtype))


class Attention(nn.Module):
    """Full attention of a chunk over its prefix and itself."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, chunk: Chunk | Packed, layer: int) -> Tensor:
        """(B, T, D) -> (B, T, D); writes the chunk's keys and values of this layer."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        if chunk.rotation is not None:
            q, k = rotate(q, chunk.rotation), rotate(k, chunk.rotation)
        return self.proj(chunk.attend(layer, q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the tanh form of GELU."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, h: Tensor, condition: Tensor, chunk: Chunk | Packed, layer: int) -> Tensor:
        """h (B, n, r, D), condition (B, n, 1, D) -> (B, n, r, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        frames = _modulated(h, shift1, scale1).flatten(1, 2)  # (B, T, D)
        h = h + gate1 * self.attn(frames, chunk, layer).view_as(h)
        return h + gate2 * self.mlp(_modulated(h, shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated projection to mel bins."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.mel_bins)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h (B, n, r, D), condition (B, n, 1, D) -> (B, n, r, M)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(_modulated(h, shift, scale))


class DiT(nn.Module):
    """Velocity field over normalised mel frames."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.t_embedder = TimeEmbedder(config.hidden_size)
        # One row more than codes: the null token of classifier-free guidance, which streaming never uses.
        self.semantic_token_embedding = nn.Embedding(config.audio_codes + 1, config.hidden_size)
        self.input_linear = nn.Linear(config.mel_bins, config.hidden_size)
        if config.position_embedding == "learnable":
            self.position_embedding: nn.Module | None = nn.Embedding(config.max_seq_len + 1, config.hidden_size)
        elif config.position_embedding == "sincos":
            self.position_embedding = SinusoidalPosition(config.hidden_size)
        else:
            self.position_embedding = None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.input_linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.input_linear.weight.dtype

    def empty_prefix(self, batch: int = 1) -> Prefix:
        """The prefix of a conversation that has heard nothing."""
        config = self.config
        shape = (config.depth, batch, config.heads, 0, config.head_dim)
        empty = torch.empty(shape, device=self.device, dtype=self.dtype)
        return Prefix(empty, empty)

    def embed_times(self, times: tuple[int, ...]) -> Tensor:
        """Embeddings of integer diffusion times 0..1000, (N, D): once per solve, not per step."""
        return self.t_embedder(torch.tensor(times, device=self.device))

    def chunk(self, tokens: Tensor, repeat: int, start: int, prefix: Prefix) -> Chunk:
        """Gather what a chunk of tokens (B, n) needs; its first frame has the absolute position `start`."""
        return self.chunk_within(tokens, repeat, start, prefix.with_room(tokens.shape[1] * repeat))

    def chunk_within(self, tokens: Tensor, repeat: int, start: int, cache: Prefix) -> Chunk:
        """As `chunk`, behind a prefix that has its rows already: the last of `cache`."""
        frames = tokens.shape[1] * repeat
        position = None
        if self.position_embedding is not None:
            rows = torch.arange(start, start + frames, device=self.device)
            position = self.position_embedding(rows).to(self.dtype)
        return Chunk(
            tokens=self.semantic_token_embedding(tokens.to(self.device)),
            repeat=repeat,
            rotation=rotary(self.config, start, frames, self.device),
            position=position,
            cache=cache,
        )

    def forward(self, x: Tensor, time: Tensor, chunk: Chunk | Packed) -> Tensor:
        """Velocity at x (B, T, M), time embedding (B or 1, D), or (1, n, D) of each token. -> (B, T, M)

        The chunk's keys and values of every layer are written at the end of `chunk.cache`.
        """
        h = self.input_linear(x.to(self.dtype))
        if chunk.position is not None:
            h = h + chunk.position
        h = h.unflatten(1, (-1, chunk.repeat))  # (B, n, r, D)
        time = time if time.dim() == 3 else time[:, None]
        condition = (time + chunk.tokens)[:, :, None]  # (B, n, 1, D)
        for layer, block in enumerate(self.blocks):
            h = block(h, condition, chunk, layer)
        return self.final_layer(h, condition).flatten(1, 2)


# ---- loading ----------------------------------------------------------------------------------------------------


def load_dit(folder: Path, device: torch.device | str, dtype: torch.dtype) -> DiT:
    """Load `audio_detokenizer/`: `model.safetensors` (as converted), else the released `model.pt`.

    Raises CheckpointError, ConfigError or WeightsError.
    """
    config = FlowConfig.read(folder / "config.yaml")
    with torch.device("meta"):
        dit = DiT(config)
    load_strict(dit, _flow_source(folder), str(folder), device=device, dtype=dtype)
    return dit


def _flow_source(folder: Path) -> Source:
    converted = folder / SINGLE_FILE
    return safetensors_source(converted) if converted.exists() else released_flow(folder)


def released_flow(folder: Path) -> Source:
    """The flow model's tensors in the released `model.pt`, unprefixed.

    The file holds a whole training state: what is not the speech model (resampler.kernel, ...) is ignored.
    """
    released = torch_source(folder / ARCHIVE, "state_dict")
    return {name.replace(FLOW_PREFIX, ""): item for name, item in released.items() if FLOW_PREFIX in name}
