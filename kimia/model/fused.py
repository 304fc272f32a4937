"""The decode step of many turns at once: one position of each, at a fixed number of rows.

The plain layers of `kimia.model.lm` say what is computed; here the same numbers come from fewer and larger operations:
q, k and v in one matrix product, gate and up in another, rotary tables made once. The fused matrices take the place of
the parts, which become views of them: no weight is stored twice.

Nobody's numbers depend on the neighbours. Matrix products always have the full number of rows, whoever fills them: a
product of another shape would round otherwise. Attention, where turns differ in length, is computed turn by turn over
exactly its own positions. What remains works number by number; there the width of a layer must be a multiple of 32,
as in every release, since vector and remainder of a CPU loop round otherwise, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia.model.lm import DecoderLayer, DualTrackLM, RMSNorm, rotary_tables
from kimia.model.turn_cache import TurnCache

FEW_ROWS = 3  # up to which BLAS is fastest with the rows outside; measured, see benchmarks/RESULTS.md


@dataclass(frozen=True)
class RowFeed:
    """One turn's next position, and the branches that it needs."""

    audio_id: int
    text_id: int
    cache: TurnCache
    text: bool
    audio: bool


@dataclass(frozen=True)
class Wanted:
    """Which logits the step has to give."""

    text: bool
    audio: bool


class RowViews:
    """One row's part of the step: where its keys go and what it sees, per slot."""

    def __init__(self, feed: RowFeed) -> None:
        self.feed = feed
        feed.cache.reserve(feed.cache.length + 1)
        self._places, self._seen = feed.cache.next_position()

    def attend(self, slot: int, q: Tensor, kv: Tensor) -> Tensor:
        """q (1, kv_heads, group, D), kv (2, 1, kv_heads, D) -> (1, kv_heads, group, D): queries that share a key.

        head together, each sees every position.
        """
        self._places[slot].copy_(kv)
        return F.scaled_dot_product_attention(q, self._seen[2 * slot], self._seen[2 * slot + 1])


@dataclass(frozen=True)
class Heads:
    """How the columns of the fused projection divide."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def rotated(self) -> int:
        """Heads that turn with the position: queries and keys."""
        return self.heads + self.kv_heads


class FusedLayer:
    """One decoder layer for one position of each row."""

    def __init__(self, layer: DecoderLayer, slot: int, heads: Heads) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.slot = slot
        self.heads = heads
        self.qkv, self.qkv_bias = fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj.weight
        self.gate_up, _ = fuse(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj.weight
        self.width = mlp.down_proj.in_features
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm

    def __call__(self, x: Tensor, rows: Sequence[RowViews | None], cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H) -> (B, H). `rows` are the first of B; None where nobody needs the result."""
        x = x + linear(self._attention(norm(x, self.before), rows, cos, sin), self.out)
        gate, up = linear(norm(x, self.between), self.gate_up).tensor_split((self.width,), dim=-1)
        return x + linear(F.silu(gate).mul_(up), self.down)

    def _attention(self, x: Tensor, rows: Sequence[RowViews | None], cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.heads
        qkv = linear(x, self.qkv, self.qkv_bias).contiguous().view(len(x), -1, heads.head_dim)
        turning = qkv[:, : heads.rotated]
        turning.copy_(rotate(turning.float(), cos, sin))
        q = qkv[:, : heads.heads].view(len(x), 1, heads.kv_heads, -1, heads.head_dim).unbind(0)
        kv = qkv[:, heads.heads :].view(len(x), 2, 1, heads.kv_heads, heads.head_dim).unbind(0)
        nothing = torch.zeros_like(q[0])
        mixed = [nothing if row is None else row.attend(self.slot, *its) for row, *its in zip_longest(rows, q, kv)]
        return torch.cat(mixed).view(len(x), -1)


class FusedLM:
    """The language model as the decode step needs it, for `rows` turns at once."""

    def __init__(self, lm: DualTrackLM, rows: int) -> None:
        config = lm.config
        self.lm = lm
        self.rows = rows
        heads = Heads(config.heads, config.kv_heads, config.head_dim)
        layers = [FusedLayer(layer, slot, heads) for slot, layer in enumerate(_layers(lm))]
        self._trunk = layers[: config.fork_layer + 1]
        self._upper = layers[config.fork_layer + 1 : config.layers]
        self._mimo = layers[config.layers :]
        positions = torch.arange(config.max_positions, device=lm.device)[:, None]
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)
        self._cos = cos[:, 0]  # (positions, 1, head_dim)
        self._sin = torch.cat([-sin[..., : config.head_dim // 2], sin[..., config.head_dim // 2 :]], dim=-1)[:, 0]

    def new_cache(self, *, audio: bool) -> TurnCache:
        """An empty cache for one turn; without `audio` it has no room for the audio branch."""
        config = self.lm.config
        slots = config.layers + (config.mimo_layers if audio else 0)
        return TurnCache(slots, config.kv_heads, config.head_dim, self.lm.lm_head.weight)

    @torch.inference_mode()
    def step(self, feeds: Sequence[RowFeed], wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
        """Text and audio logits of the rows' next position, (B, V) each, or None where they are not wanted.

        Rows beyond the feeds hold garbage. Every turn's cache has moved on by one position.
        """
        rows = [RowViews(feed) for feed in feeds]
        x, cos, sin = self._embed(feeds)
        fork = self._through(self._trunk, x, rows, (cos, sin))
        text, audio = (row.feed.text for row in rows), (row.feed.audio for row in rows)
        text_hidden = self._branch(self._upper, fork, _only(rows, text), (cos, sin))
        audio_hidden = self._branch(self._mimo, fork, _only(rows, audio), (cos, sin))
        for feed in feeds:
            feed.cache.advance(1)
        text_logits = audio_logits = None
        if wanted.text and text_hidden is not None:
            text_logits = linear(norm(text_hidden, self.lm.model.norm), self.lm.lm_head.weight)
        if wanted.audio and audio_hidden is not None:
            audio_logits = linear(norm(audio_hidden, self.lm.model.mimo_norm), self.lm.mimo_output.weight)
        return text_logits, audio_logits

    def _embed(self, feeds: Sequence[RowFeed]) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of both tracks' embeddings (B, H), cosines and sines (B, 1, D); idle rows have id and position 0."""
        idle = [0] * (self.rows - len(feeds))
        numbers = [
            [feed.audio_id for feed in feeds] + idle,
            [feed.text_id for feed in feeds] + idle,
            [feed.cache.length for feed in feeds] + idle,
        ]
        audio, text, positions = torch.tensor(numbers, device=self.lm.device)
        table = self.lm.model.embed_tokens.weight
        return F.embedding(audio, table) + F.embedding(text, table), self._cos[positions], self._sin[positions]

    def _branch(
        self, layers: Sequence[FusedLayer], x: Tensor, rows: Sequence[RowViews | None], turned: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """What comes out of a branch; None where no row needs it, so that nothing is computed."""
        return self._through(layers, x, rows, turned) if any(rows) else None

    def _through(
        self, layers: Sequence[FusedLayer], x: Tensor, rows: Sequence[RowViews | None], turned: tuple[Tensor, Tensor]
    ) -> Tensor:
        for layer in layers:
            x = layer(x, rows, *turned)
        return x


def _layers(lm: DualTrackLM) -> list[DecoderLayer]:
    """All layers in the order of their slots."""
    return [*lm.model.layers, *(() if lm.text_only else lm.model.mimo_layers)]


def _only(rows: Sequence[RowViews | None], needed: Iterable[bool]) -> list[RowViews | None]:
    return [row if need else None for row, need in zip(rows, needed, strict=True)]


# ---- operations -------------------------------------------------------------------------------------------------


@torch.no_grad()
def fuse(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weights (and biases) of projections that read the same input, on top of one another.

    The parts become views of the result. Parts that are views of one matrix already are left as they are.
    """
    whole = getattr(parts[0], "_fused_with", None)
    if whole is None:
        whole = torch.cat([part.weight for part in parts])
        ends = tuple(accumulate(part.out_features for part in parts[:-1]))
        for part, rows in zip(parts, whole.tensor_split(ends), strict=True):
            part.weight.data = rows
        parts[0]._fused_with = whole
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return whole, bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, K), weight (N, K) -> (B, N), on the CPU transposed in memory beyond a few rows.

    BLAS is fastest there when the rows are what lies side by side.
    """
    if x.is_cuda or len(x) <= FEW_ROWS:
        return F.linear(x, weight, bias)
    columns = x.t().contiguous()
    if bias is None:
        return torch.mm(weight, columns).t()
    return torch.addmm(bias[:, None], weight, columns).t()


def norm(x: Tensor, by: RMSNorm) -> Tensor:
    """`RMSNorm` in fewer operations: (B, H) -> (B, H)."""
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(wide.new_full((), by.eps), size, size, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(by.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, heads, D) float32; sines (B, 1, D) are negative in the first half."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
