"""The decode step of many turns at once: one position of each, at a fixed number of rows.

The plain layers of `kimia.model.lm` say what is computed; here the same numbers come from fewer and larger operations:
q, k and v in one matrix product, gate and up in another, rotary tables made once. The fused matrices take the place of
the parts, which become views of them: no weight is stored twice. Every operation writes into memory that was made once
(`Scratch`), so that a step allocates next to nothing.

Nobody's numbers depend on the neighbours. Matrix products always have the full number of rows, whoever fills them: a
product of another shape would round otherwise. On a CPU the rows come in whole blocks: some processors round the rows
of a remainder otherwise. Attention, where turns differ in length, is computed turn by turn over exactly its own
positions. What remains works number by number. Vector and remainder of a CPU loop round an exponential otherwise, too,
so the width of SwiGLU must leave no remainder: `Engine` sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia.model.cache import GrowingCache
from kimia.model.config import LMConfig
from kimia.model.lm import DecoderLayer, DualTrackLM, RMSNorm, rotary_tables
from kimia.model.philox import Track
from kimia.model.turn_cache import TurnCache

ROW_BLOCK = 4  # rows that BLAS computes alike; what is left over is rounded otherwise on a CPU with AVX2 alone
FEW_ROWS = 3  # up to which BLAS is fastest with the rows outside; measured, see benchmarks/RESULTS.md


class RowFeed(NamedTuple):
    """One turn's next position, and the branches that it needs."""

    audio_id: int
    text_id: int
    cache: GrowingCache
    text: bool
    audio: bool


class Wanted(NamedTuple):
    """Which logits the step has to give."""

    text: bool
    audio: bool


class Company(NamedTuple):
    """Which rows a step computes, and what for."""

    all: Sequence[int]
    texts: Sequence[int]  # those that need the layers above the fork
    audios: Sequence[int]  # those that need the audio branch
    wanted: Wanted


class Scratch:
    """Where a step of B rows, or some more, writes its numbers; all layers use the same buffers."""

    def __init__(self, config: LMConfig, rows: int, like: Tensor) -> None:
        """Type and device are those of `like`."""
        self._like = like
        self.columns = not like.is_cuda and rows > FEW_ROWS
        if self.columns:
            rows += -rows % ROW_BLOCK
        self._rows = rows
        width, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.heads, config.kv_heads
        self.x_and_eps = like.new_full((rows, width + 1), math.sqrt(width * config.rms_norm_eps))
        self.x = self.x_and_eps[:, :width]  # what goes from layer to layer
        self.fork = like.new_empty(rows, width)
        self.normed = like.new_empty(rows, width)
        self.size = like.new_empty(rows, 1, dtype=torch.float32)
        self.operand, self.product = self._room(width), self._room(width)
        self.qkv = self._room((heads + 2 * kv_heads) * head_dim)
        by_heads = self.qkv.view(rows, -1, head_dim)
        self.turning, self.given = by_heads.tensor_split((heads + kv_heads,), dim=1)  # queries and keys; values
        self.heads = like.new_empty(rows, heads + 2 * kv_heads, head_dim)
        self.turned, self.values = self.heads.tensor_split((heads + kv_heads,), dim=1)
        self.wide = self.turned if like.dtype == torch.float32 else self.turned.float()
        self.queries = self.heads[:, :heads].view(rows, kv_heads, -1, head_dim)  # those that share a key head together
        self.keys_values = self.heads[:, heads:].view(rows, 2, kv_heads, head_dim)
        self.gate_up = self._room(2 * config.intermediate_size)
        self.gate, self.up = self.gate_up.tensor_split(2, dim=-1)
        self.logits = self._room(config.vocab_size, 2)
        self.angles = like.new_empty(rows, 2, 1, head_dim, dtype=torch.float32)
        self.cos, sin = self.angles.unbind(1)
        self.sines, self.halves, self.wide_halves = (
            each.tensor_split(2, dim=-1) for each in (sin, self.turning, self.wide)
        )
        self._host = torch.zeros(3, rows, dtype=torch.long, pin_memory=like.is_cuda)
        self.numbers = self._host.to(like.device)  # audio ids, text ids, positions

    def fill(self, numbers: Sequence[tuple[int, int, int]]) -> None:
        """The ids of both tracks and the positions of the first rows; the others have zeros."""
        host = self._host.numpy()
        host[:, : len(numbers)] = np.array(numbers).T
        host[:, len(numbers) :] = 0
        if self.numbers is not self._host:
            self.numbers.copy_(self._host, non_blocking=True)

    def _room(self, width: int, *outer: int) -> Tensor:
        """Room for (*outer, B, width) as matrix products like it best.

        On the CPU, beyond a few rows, BLAS is fastest when the rows are what lies side by side.
        """
        if self.columns:
            return self._like.new_empty(*outer, width, self._rows).transpose(-2, -1)
        return self._like.new_empty(*outer, self._rows, width)


class Attention(Protocol):
    """What a layer asks of attention."""

    def begin(self, feeds: Sequence[RowFeed]) -> None:
        """Make room for the next position of each turn, before the step."""

    def __call__(self, slot: int, rows: Sequence[int]) -> Tensor:
        """Keep the keys and values of `rows` and let their queries see: (B, heads x D)."""


class TurnByTurn:
    """Attention of one row after another, each over exactly its own positions; (B, heads x D) for all of them."""

    def __init__(self, scratch: Scratch) -> None:
        self._q, self._kv = scratch.queries[:, None].unbind(0), scratch.keys_values[:, :, None].unbind(0)
        self._nobody = [torch.zeros_like(q) for q in self._q]
        self._places: list[Sequence[Tensor]] = []
        self._seen: list[Sequence[Tensor]] = []

    def begin(self, feeds: Sequence[RowFeed]) -> None:
        """Look up where the next position of each turn belongs, per slot, and what it sees."""
        self._places.clear()
        self._seen.clear()
        for feed in feeds:
            assert isinstance(feed.cache, TurnCache)
            feed.cache.reserve(feed.cache.length + 1)
            places, seen = feed.cache.next_position()
            self._places.append(places)
            self._seen.append(seen)

    def __call__(self, slot: int, rows: Sequence[int]) -> Tensor:
        """Keep the keys and values of `rows` and let their queries see; zeros for the other rows.

        Queries that share a key head (1, kv_heads, group, D) go together: each of them sees every position.
        """
        mixed = self._nobody.copy()
        for row in rows:
            self._places[row][slot].copy_(self._kv[row])
            seen = self._seen[row]
            mixed[row] = F.scaled_dot_product_attention(self._q[row], seen[2 * slot], seen[2 * slot + 1])
        return (torch.cat(mixed) if len(mixed) > 1 else mixed[0]).view(len(mixed), -1)


class Norm:
    """`RMSNorm` in fewer operations: x weight / sqrt(mean(x^2) + eps) = x (weight sqrt(H)) / |(x, sqrt(H eps))|."""

    def __init__(self, norm: RMSNorm) -> None:
        self._weight = norm.weight.float() * math.sqrt(len(norm.weight))

    def __call__(self, s: Scratch) -> None:
        """`s.operand` becomes `s.x`, normed."""
        torch.linalg.vector_norm(s.x_and_eps, dim=-1, keepdim=True, dtype=torch.float32, out=s.size)
        torch.div(s.x, s.size, out=s.normed)
        torch.mul(s.normed, self._weight, out=s.operand)


class Matrix:
    """A weight (N, K) and its bias, if it has one, as the step multiplies by them."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight.t(), bias

    def product(self, x: Tensor, out: Tensor) -> None:
        """x (B, K) to out (B, N)."""
        if self._bias is None:
            torch.mm(x, self._weight, out=out)
        else:
            torch.addmm(self._bias, x, self._weight, out=out)

    def add_product(self, s: Scratch, x: Tensor) -> None:
        """`s.x` += the product of x (B, K), without bias."""
        if s.columns:  # BLAS writes columns, s.x lies in rows
            s.x.add_(torch.mm(x, self._weight, out=s.product))
        else:
            s.x.addmm_(x, self._weight)


class QuantizedMatrix:
    """The same of a weight that only its library knows how to multiply by."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def product(self, x: Tensor, out: Tensor) -> None:
        """x (B, K) to out (B, N)."""
        out.copy_(F.linear(x, self._weight, self._bias))

    def add_product(self, s: Scratch, x: Tensor) -> None:
        """`s.x` += the product of x (B, K), without bias."""
        s.x.add_(F.linear(x, self._weight))


def matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix | QuantizedMatrix:
    """The one that the weight asks for."""
    plain = type(weight) in (Tensor, nn.Parameter)
    return Matrix(weight, bias) if plain else QuantizedMatrix(weight, bias)


class FusedLayer:
    """One decoder layer for one position of each row."""

    def __init__(self, layer: DecoderLayer, slot: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = attention.q_proj, attention.k_proj, attention.v_proj
        self.slot = slot
        self.qkv = matrix(fuse(*inputs), torch.cat([part.bias for part in inputs]))
        self.gate_up = matrix(fuse(mlp.gate_proj, mlp.up_proj))
        self.out, self.down = matrix(attention.o_proj.weight), matrix(mlp.down_proj.weight)
        self.before, self.between = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)

    def __call__(self, s: Scratch, attend: Attention, rows: Sequence[int]) -> None:
        """`s.x` becomes what comes out of the layer; it means something for `rows` only."""
        self.before(s)
        self.qkv.product(s.operand, s.qkv)
        rotate(s)
        mixed = attend(self.slot, rows)
        self.out.add_product(s, s.operand.copy_(mixed) if s.columns else mixed)
        self.between(s)
        self.gate_up.product(s.operand, s.gate_up)
        F.silu(s.gate, inplace=True).mul_(s.up)
        self.down.add_product(s, s.gate)


class Head:
    """From what comes out of a branch to logits."""

    def __init__(self, norm: RMSNorm, head: nn.Linear) -> None:
        self._norm = Norm(norm)
        self._matrix = matrix(head.weight)

    def __call__(self, s: Scratch, logits: Tensor) -> None:
        """Write the (B, V) logits of `s.x`."""
        self._norm(s)
        self._matrix.product(s.operand, logits)


class FusedLM:
    """The language model as the decode step needs it, for `rows` turns at once."""

    def __init__(self, lm: DualTrackLM, rows: int) -> None:
        config = lm.config
        self.lm = lm
        self.rows = rows
        layers = [FusedLayer(layer, slot) for slot, layer in enumerate(_layers(lm))]
        self._trunk = layers[: config.fork_layer + 1]
        self._upper = layers[config.fork_layer + 1 : config.layers]
        self._mimo = layers[config.layers :]
        self._heads = [Head(lm.model.norm, lm.lm_head)]
        if not lm.text_only:
            self._heads.append(Head(lm.model.mimo_norm, lm.mimo_output))
        self._scratch = Scratch(config, rows, lm.like)
        self._attend: Attention = TurnByTurn(self._scratch)
        self._angles = signed_angles(config, lm.device)

    def new_cache(self, *, audio: bool) -> GrowingCache:
        """An empty cache for one turn; without `audio` it has no room for the audio branch."""
        config = self.lm.config
        slots = config.layers + (config.mimo_layers if audio else 0)
        return TurnCache(slots, config.kv_heads, config.head_dim, self.lm.like)

    @torch.inference_mode()
    def step(self, feeds: Sequence[RowFeed], wanted: Wanted) -> Tensor:
        """Logits of the rows' next position, text then audio, (2, B or more, V); every turn's cache moves on by one.

        Those that are not wanted, and rows beyond the feeds, are garbage. The next step overwrites them.
        """
        self._attend.begin(feeds)
        self._scratch.fill([(feed.audio_id, feed.text_id, feed.cache.length) for feed in feeds])
        texts, audios = ([row for row, feed in enumerate(feeds) if getattr(feed, part)] for part in ("text", "audio"))
        self._run(Company(range(len(feeds)), texts, audios, wanted))
        for feed in feeds:
            feed.cache.advance(1)
        return self._scratch.logits

    def _run(self, company: Company) -> None:
        """Compute the step; on a GPU there is another way."""
        self._compute(company)

    def _compute(self, company: Company) -> None:
        """From what was filled in to logits and caches: nothing here looks at a number or waits for one."""
        s = self._scratch
        both = company.texts and company.audios
        self._embed()
        self._through(self._trunk, company.all)
        if both:
            s.fork.copy_(s.x)
        self._branch(Track.TEXT, company.texts, wanted=company.wanted.text)
        if both:
            s.x.copy_(s.fork)
        self._branch(Track.AUDIO, company.audios, wanted=company.wanted.audio)

    def _embed(self) -> None:
        """Sum of both tracks' embeddings, and the angles of the positions."""
        s, table = self._scratch, self.lm.model.embed_tokens.weight
        torch.index_select(table, 0, s.numbers[0], out=s.fork)
        torch.add(s.fork, torch.index_select(table, 0, s.numbers[1], out=s.normed), out=s.x)
        torch.index_select(self._angles, 0, s.numbers[2], out=s.angles)

    def _branch(self, track: Track, rows: Sequence[int], *, wanted: bool) -> None:
        """A branch, where a row needs it, and its logits, where they are wanted."""
        if rows:
            self._through(self._mimo if track is Track.AUDIO else self._upper, rows)
            if wanted:
                self._heads[track](self._scratch, self._scratch.logits[track])

    def _through(self, layers: Sequence[FusedLayer], rows: Sequence[int]) -> None:
        for layer in layers:
            layer(self._scratch, self._attend, rows)


def _layers(lm: DualTrackLM) -> list[DecoderLayer]:
    """All layers in the order of their slots."""
    return [*lm.model.layers, *(() if lm.text_only else lm.model.mimo_layers)]


def signed_angles(config: LMConfig, device: torch.device) -> Tensor:
    """Cosines and sines of every position, (positions, 2, 1, head_dim); sines are negative in the first half."""
    positions = torch.arange(config.max_positions, device=device)[:, None]
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)  # (positions, 1, 1, head_dim)
    sin[..., : config.head_dim // 2].neg_()
    return torch.cat([cos, sin], dim=1)


# ---- operations -------------------------------------------------------------------------------------------------


@torch.no_grad()
def fuse(*parts: nn.Linear) -> Tensor:
    """The weights of projections that read the same input, on top of one another.

    The parts become views of the result. Parts that are views of one matrix already are left as they are.
    """
    whole: Tensor | None = getattr(parts[0], "_fused_with", None)
    if whole is None:
        whole = torch.cat([part.weight for part in parts])
        ends = tuple(accumulate(part.out_features for part in parts[:-1]))
        for part, rows in zip(parts, whole.tensor_split(ends), strict=True):
            part.weight.data = rows
        parts[0]._fused_with = whole
    return whole


def rotate(s: Scratch) -> None:
    """Turn queries and keys of `s.qkv` by `s.angles`, in float32; values follow as they are."""
    torch.mul(s.turning, s.cos, out=s.wide)
    s.wide_halves[0].addcmul_(s.halves[1], s.sines[0])
    s.wide_halves[1].addcmul_(s.halves[0], s.sines[1])
    if s.turned is not s.wide:
        s.turned.copy_(s.wide)
    s.values.copy_(s.given)
