"""The dual-track language model: two id tracks in, text logits and audio logits out.

At each position an audio id and a text id share one embedding table and are added; positions of user audio also carry
a continuous feature. After the fork layer the trunk goes on to the text head while the audio branch (the MiMo
layers) goes to the audio head (Kimi-Audio report, arXiv 2504.18425, section 3):

    embed -> layers 0..fork -> layers fork+1.. -> norm      -> lm_head      (text)
                          \\-> mimo_layers      -> mimo_norm -> mimo_output  (audio)

Each arrow is a method, so what a step does not need is simply not called. Attributes have the checkpoint's key names.
B rows of unequal length are padded on the right: every row has its own positions, and a causal query never sees the
padding behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia.errors import AudioError, ParameterError
from kimia.model.attention import Visible, attention
from kimia.model.cache import Cache, KVCache
from kimia.model.checkpoint import ROTARY_LEFTOVER, load_strict, sharded_source, without
from kimia.model.config import LMConfig

AUDIO_BRANCH = r"^(model\.mimo_layers\.|model\.mimo_norm\.|mimo_output\.)"  # not read in text-only mode


# ---- inputs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one row feeds: two tracks of equal length T, and its user audio."""

    audio_ids: Sequence[int]  # (T,)
    text_ids: Sequence[int]  # (T,)
    segments: Sequence[tuple[int, int]] = ()  # (position of the first code, number of codes), in order of position
    features: Sequence[Tensor] | None = None  # per segment (frames, F) at 12.5 Hz; None or empty: none are added


@dataclass(frozen=True)
class Tracks:
    """Rows padded on the right to the longest one."""

    audio_ids: Tensor  # (B, T)
    text_ids: Tensor  # (B, T)
    counts: tuple[int, ...]  # real positions per row
    continuous: tuple[tuple[int, int, Tensor], ...]  # (row, position of the first code, (codes, F)) per segment


def stack(rows: Sequence[Row], device: torch.device) -> Tracks:
    """Pad rows to one batch. Raises AudioError when continuous features do not cover their codes."""
    counts = tuple(len(row.audio_ids) for row in rows)
    continuous = [
        (index, begin, frames) for index, row in enumerate(rows) for begin, frames in _matched(row, counts[index])
    ]
    return Tracks(
        audio_ids=_padded([row.audio_ids for row in rows], max(counts), device),
        text_ids=_padded([row.text_ids for row in rows], max(counts), device),
        counts=counts,
        continuous=tuple(continuous),
    )


def _padded(tracks: Sequence[Sequence[int]], length: int, device: torch.device) -> Tensor:
    rows = [[*track, *[0] * (length - len(track))] for track in tracks]
    return torch.tensor(rows, dtype=torch.long, device=device)  # (B, T)


def _matched(row: Row, length: int) -> list[tuple[int, Tensor]]:
    """Segment k with feature tensor k, surplus frames cut."""
    if len(row.text_ids) != length:
        raise ParameterError(f"the tracks must be equally long: {length} audio ids, {len(row.text_ids)} text ids")
    if not row.features:
        return []
    if len(row.features) != len(row.segments):
        raise AudioError(f"{len(row.segments)} audio segments in the prompt but {len(row.features)} feature tensors")
    matched = []
    for number, ((begin, codes), frames) in enumerate(zip(row.segments, row.features, strict=True)):
        if frames.shape[0] < codes:
            raise AudioError(f"audio segment {number} has {codes} codes but only {frames.shape[0]} continuous features")
        if not 0 <= begin <= begin + codes <= length:
            raise AudioError(f"audio segment {number} ({begin}, {codes}) lies outside the {length} positions")
        matched.append((begin, frames[:codes]))
    return matched


# ---- where a forward pass stands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """The T positions that one forward pass covers in each row, shared by all its layers."""

    counts: tuple[int, ...]  # real positions per row, the rest of T is padding
    positions: Tensor  # (B, T)
    visible: Visible
    cos: Tensor  # (B, 1, T, head_dim) float32
    sin: Tensor  # (B, 1, T, head_dim) float32
    cache: Cache | None  # None: the rows start here and nothing is kept


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, angles in float32.

    positions (B, T) -> two (B, 1, T, head_dim); both halves of the last axis hold the same head_dim / 2 angles.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[..., None] * theta**-exponents  # (B, T, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, heads, T, head_dim); dimension i pairs with i + head_dim / 2. Computed in float32."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


# ---- layers -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Division by the root mean square in float32, then the weight in the working dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention with grouped queries and rotary positions; q, k, v have a bias, o has none."""

    def __init__(self, config: LMConfig, slot: int) -> None:
        super().__init__()
        width, kv_width = config.hidden_size, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.head_dim = config.head_dim
        self.slot = slot  # place in the KV cache

    def forward(self, x: Tensor, extent: Extent) -> Tensor:
        """(B, T, H) -> (B, T, H); extends the extent's cache."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, extent.cos, extent.sin), rotate(k, extent.cos, extent.sin)
        if extent.cache is not None:
            k, v = extent.cache.append(self.slot, k, v, extent.positions, extent.counts)
        mixed = attention(q, k, v, extent.visible)  # (B, heads, T, head_dim)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals, as in Qwen2."""

    def __init__(self, config: LMConfig, slot: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, slot)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, extent: Extent) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        x = x + self.self_attn(self.input_layernorm(x), extent)
        return x + self.mlp(self.post_attention_layernorm(x))


class VQAdaptor(nn.Module):
    """Continuous features into the embedding space. (The release's index 2 is a dropout of 0.)"""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layers = nn.Sequential(
            nn.Linear(config.adaptor_input_dim, width),
            nn.SiLU(),
            nn.Identity(),
            nn.Linear(width, width),
            nn.LayerNorm(width, eps=config.rms_norm_eps),
        )

    def forward(self, frames: Tensor) -> Tensor:
        """(n, F) -> (n, H)."""
        return self.layers(frames)


class Backbone(nn.Module):
    """What lies under `model.` in the checkpoint."""

    def __init__(self, config: LMConfig, *, text_only: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token)
        self.vq_adaptor = VQAdaptor(config)
        self.layers = nn.ModuleList([DecoderLayer(config, slot) for slot in range(config.layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not text_only:
            slots = range(config.layers, config.layers + config.mimo_layers)
            self.mimo_layers = nn.ModuleList([DecoderLayer(config, slot) for slot in slots])
            self.mimo_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---- the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Everything that a full forward pass computes; last axis H, of logits the vocabulary V."""

    inputs_embeds: Tensor  # (B, T, H)
    fork_hidden: Tensor  # (B, T, H) output of the fork layer, not normed
    text_hidden: Tensor  # (B, T, H) after norm
    audio_hidden: Tensor  # (B, T, H) after mimo_norm
    text_logits: Tensor  # (B, T, V)
    audio_logits: Tensor  # (B, T, V)


class DualTrackLM(nn.Module):
    """The language model. `text_only` leaves the audio branch out: neither stored nor computed."""

    def __init__(self, config: LMConfig, *, text_only: bool = False) -> None:
        super().__init__()
        self.config = config
        self.text_only = text_only
        self.model = Backbone(config, text_only=text_only)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not text_only:
            self.mimo_output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def like(self) -> Tensor:
        """A tensor of the place and type in which the model computes: other weights may be quantised."""
        return self.model.norm.weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.like.device

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for `rows` turns."""
        return KVCache(rows, self.config.layers + self.config.mimo_layers)

    def extent(self, counts: tuple[int, ...], cache: Cache | None = None) -> Extent:
        """The next `counts[row]` positions of each row, behind what the cache holds."""
        length = max(counts)
        starts = (0,) * len(counts) if cache is None else cache.lengths
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(length, device=self.device)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        visible = Visible(tuple(start + length for start in starts), length, causal=True, device=self.device)
        return Extent(counts, positions, visible, cos, sin, cache)

    def embed(self, tracks: Tracks) -> Tensor:
        """Sum of both tracks' embeddings; at continuous features (audio + adaptor) * sqrt(2) + text.

        -> (B, T, H). Text id 0 is a token like any other and is added, too.
        """
        audio = self.model.embed_tokens(tracks.audio_ids)
        if tracks.continuous:
            rows, positions, frames = self._gathered(tracks)
            root = audio.new_tensor(2.0).sqrt()  # rounded to the working dtype, as in training
            heard = (audio[rows, positions] + self.model.vq_adaptor(frames)) * root  # (n, H)
            audio = audio.index_put((rows, positions), heard)
        return audio + self.model.embed_tokens(tracks.text_ids)

    def _gathered(self, tracks: Tracks) -> tuple[Tensor, Tensor, Tensor]:
        """Row, position and features of all n continuous positions: (n,), (n,), (n, F)."""
        wanted = self.config.adaptor_input_dim
        for _, _, frames in tracks.continuous:
            if frames.shape[1] != wanted:
                raise AudioError(f"continuous features are {frames.shape[1]} wide, kimia_adaptor_input_dim is {wanted}")
        spots = [(row, begin + j) for row, begin, frames in tracks.continuous for j in range(frames.shape[0])]
        rows, positions = torch.tensor(spots, dtype=torch.long, device=self.device).reshape(-1, 2).unbind(1)
        return rows, positions, torch.cat([frames.to(self.like) for _, _, frames in tracks.continuous])

    def trunk(self, embeds: Tensor, extent: Extent) -> Tensor:
        """Layers 0..fork: (B, T, H) -> (B, T, H), what both branches read."""
        return _through(self.model.layers[: self.config.fork_layer + 1], embeds, extent)

    def text_branch(self, fork_hidden: Tensor, extent: Extent) -> Tensor:
        """Layers above the fork and norm: (B, T, H) -> (B, T, H), input of `lm_head`."""
        return self.model.norm(_through(self.model.layers[self.config.fork_layer + 1 :], fork_hidden, extent))

    def audio_branch(self, fork_hidden: Tensor, extent: Extent) -> Tensor:
        """MiMo layers and mimo_norm: (B, T, H) -> (B, T, H), input of `mimo_output`."""
        if self.text_only:
            raise ParameterError("the model was loaded for text only; load it with its audio branch to make speech")
        return self.model.mimo_norm(_through(self.model.mimo_layers, fork_hidden, extent))

    def forward(self, tracks: Tracks, cache: KVCache | None = None) -> Activations:
        """Everything at every position: for training, verification and as plain twin of the generation loop."""
        extent = self.extent(tracks.counts, cache)
        embeds = self.embed(tracks)
        fork_hidden = self.trunk(embeds, extent)
        text_hidden = self.text_branch(fork_hidden, extent)
        audio_hidden = self.audio_branch(fork_hidden, extent)
        return Activations(
            embeds, fork_hidden, text_hidden, audio_hidden, self.lm_head(text_hidden), self.mimo_output(audio_hidden)
        )


def _through(layers: nn.ModuleList, x: Tensor, extent: Extent) -> Tensor:
    for layer in layers:
        x = layer(x, extent)
    return x


def last_position(hidden: Tensor, extent: Extent) -> Tensor:
    """The last real position of each row: (B, T, H) -> (B, H)."""
    last = torch.tensor([count - 1 for count in extent.counts], device=hidden.device)
    return hidden[torch.arange(len(last), device=hidden.device), last]


def load_lm(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    text_only: bool = False,
    quantize: str | None = None,
) -> DualTrackLM:
    """The language model of a released checkpoint folder (`config.json` and the shards of the weight map).

    text_only reads and allocates nothing of the audio branch. `quantize` is a scheme of `kimia.model.quantize`; weights
    are quantised when all are loaded. Raises CheckpointError and its kinds; ParameterError as `check_scheme` does.
    """
    from kimia.model import quantize as quantization  # builds on this module

    scheme = quantization.check_scheme(quantize, device)
    config = LMConfig.read(folder / "config.json")
    with torch.device("meta"):
        lm = DualTrackLM(config, text_only=text_only)
    ignored = [ROTARY_LEFTOVER.pattern, *([AUDIO_BRANCH] if text_only else [])]
    load_strict(lm, without(sharded_source(folder), *ignored), str(folder), device=device, dtype=dtype)
    if scheme is not None:
        quantization.quantize(lm, scheme)
    return lm
