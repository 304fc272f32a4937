"""The decode step on a GPU: keys and values in pages, and the whole step as one CUDA graph.

A graph repeats kernels at fixed addresses, while turns come, grow and go. All caches therefore share one pool of pages
(`Pages`); a turn owns some of them (`PagedCache`), and a table that is copied to the device before each step says whose
they are. The step itself is that of `kimia.model.fused`, attention apart: `PagedAttention` serves all rows at once, by
flash-attn where it is installed and fits, else by gathering the pages for PyTorch. Without CUDA the same step runs as
it stands, which is how it is tested.

Neighbours change nothing but rounding here: how many pages a step looks at follows from its longest row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia.model.attention import decode_in_pages, flash_fits
from kimia.model.fused import Company, FusedLM, RowFeed, Scratch
from kimia.model.lm import DualTrackLM

PAGE = 256  # positions; flash-attn takes multiples of it
NOBODY = 0  # the page of rows without a turn: written, never read by a turn
FIRST_PAGES = 1  # per row; the pool grows by half: while it moves, both lie in memory


class Pages:
    """Keys and values of all turns: (slots, 2, pages, PAGE, kv_heads, head_dim)."""

    def __init__(self, slots: int, kv_heads: int, head_dim: int, count: int, like: Tensor) -> None:
        """`count` pages to begin with; type and device are those of `like`."""
        self.store = like.new_zeros(slots, 2, count, PAGE, kv_heads, head_dim)
        self.free = list(range(count - 1, NOBODY, -1))

    def take(self) -> int:
        """A page of zeros: what attention masks still counts nought times, which NaN would survive."""
        if not self.free:
            self._grow()
        page = self.free.pop()
        self.store[:, :, page].zero_()
        return page

    def _grow(self) -> None:
        """Half as many pages more, elsewhere."""
        slots, two, count, *page = self.store.shape
        more = max(1, count // 2)
        larger = self.store.new_zeros(slots, two, count + more, *page)
        larger[:, :, :count] = self.store
        self.store = larger
        self.free.extend(range(count + more - 1, count - 1, -1))


class PagedCache:
    """The cache of one turn: some pages, and its number of positions. They are free again when it is forgotten."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.table: list[int] = []
        self.length = 0
        weakref.finalize(self, pages.free.extend, self.table)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions per row: one row."""
        return (self.length,)

    @property
    def nbytes(self) -> int:
        """What the cache holds, room included."""
        store = self._pages.store
        return store.nbytes // store.shape[2] * len(self.table)

    def reserve(self, positions: int) -> None:
        """Room for so many positions altogether."""
        while len(self.table) * PAGE < positions:
            self.table.append(self._pages.take())

    def append(
        self,
        slot: int,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        counts: tuple[int, ...],  # noqa: ARG002  # they follow from the shape
    ) -> tuple[Tensor, Tensor]:
        """Store T new positions of one slot; its keys and values so far, two (1, kv_heads, S, D).

        k, v (1, kv_heads, T, D) of `positions` (1, T). The turn moves on by `advance`, once all its slots have them.
        """
        table = torch.tensor(self.table, device=k.device)
        store = self._pages.store[slot]  # (2, pages, PAGE, kv_heads, D)
        store[:, table[positions[0] // PAGE], positions[0] % PAGE] = torch.stack([k, v])[:, 0].transpose(1, 2)
        seen = store[:, table].flatten(1, 2)[:, : self.length + k.shape[2]].transpose(1, 2)
        return seen[0][None], seen[1][None]

    def advance(self, positions: int) -> None:
        """So many positions have been written."""
        self.length += positions

    def cut(self, positions: int) -> None:
        """Forget what lies behind so many positions; pages without any are free again."""
        self.length = min(self.length, positions)
        kept = -(-self.length // PAGE)
        self._pages.free.extend(self.table[kept:])
        del self.table[kept:]


class PagedAttention:
    """Attention of all rows at once, (B, heads x D): rows without a turn use the page of nobody."""

    def __init__(self, scratch: Scratch, pages: Pages, positions: int) -> None:
        """`positions` is the most that a turn can have."""
        rows = len(scratch.x)
        self.pages = pages
        self.width = 1  # pages that the step looks at, per row: a power of two, so that there are few graphs
        self._s = scratch
        self._host = torch.zeros(rows, -(-positions // PAGE), dtype=torch.int32, pin_memory=scratch.x.is_cuda)
        self._table = self._host.to(scratch.x.device, copy=True)  # (B, pages)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=scratch.x.device)

    def begin(self, feeds: Sequence[RowFeed]) -> None:
        """Make room for the next position of each turn, and say where its pages are."""
        table = self._host.numpy()
        table[:] = NOBODY
        longest = 1
        for row, feed in enumerate(feeds):
            assert isinstance(feed.cache, PagedCache)
            feed.cache.reserve(feed.cache.length + 1)
            its = feed.cache.table
            table[row] = its[0]  # what it does not have is masked: no other turn's numbers, not even there
            table[row, : len(its)] = its
            longest = max(longest, len(its))
        self.width = min(1 << (longest - 1).bit_length(), table.shape[1])
        self._table.copy_(self._host)

    def place(self) -> None:
        """Take over the positions of the step: the first thing that it computes."""
        self._lengths.copy_(self._s.numbers[2])

    def __call__(self, slot: int, rows: Sequence[int]) -> Tensor:  # noqa: ARG002  # all rows are one call
        """Keep the keys and values of all rows and let their queries see."""
        store, s = self.pages.store[slot], self._s
        table = self._table[:, : self.width]
        if flash_fits(s.queries):
            return decode_in_pages(s.queries, s.keys_values, store, self._lengths, table)
        return self._gathered(store, table)

    def _gathered(self, store: Tensor, table: Tensor) -> Tensor:
        """The same by PyTorch: pages are copied side by side, and what lies beyond a row's position is masked."""
        s, at = self._s, self._lengths.long()
        page = table.gather(1, at[:, None] // PAGE)[:, 0].long()
        store[:, page, at % PAGE] = s.keys_values.transpose(0, 1)
        keys, values = store[:, table.long()].flatten(2, 3).transpose(2, 3)  # (B, kv_heads, S, D) each
        visible = torch.arange(keys.shape[2], device=keys.device) <= at[:, None]  # (B, S)
        return F.scaled_dot_product_attention(s.queries, keys, values, attn_mask=visible[:, None, None]).flatten(1)


class Eager:
    """What stands for the graphs where there is no CUDA."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:  # noqa: ARG002
        """Do it."""
        work()

    def forget(self) -> None:
        """Nothing was recorded."""


class Graphs:
    """CUDA graphs by what they compute; each is captured when it is first asked for."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Repeat what `work` did to its memory. It may be run more than once and always does the same."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._captured(work)
        graph.replay()

    def forget(self) -> None:
        """What the graphs read has moved."""
        self._graphs.clear()

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Run once beside the graph, for what libraries set up at first use, then record."""
        here = torch.cuda.current_stream()
        side = torch.cuda.Stream(priority=here.priority)  # type: ignore[no-untyped-call]  # kernels keep it in a graph
        side.wait_stream(here)
        with torch.cuda.stream(side):
            work()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads of the process ask of CUDA meanwhile (memory, above all) must not end the capture.
        with torch.cuda.graph(graph, pool=self._memory, stream=side, capture_error_mode="thread_local"):
            work()
        return graph


class PagedLM(FusedLM):
    """`FusedLM` with pages, and graphs where there is CUDA."""

    def __init__(self, lm: DualTrackLM, rows: int) -> None:
        super().__init__(lm, rows)
        config = lm.config
        slots = config.layers + (0 if lm.text_only else config.mimo_layers)
        like = lm.like
        self._pages = Pages(slots, config.kv_heads, config.head_dim, 1 + FIRST_PAGES * rows, like)
        self._paged = self._attend = PagedAttention(self._scratch, self._pages, config.max_positions)
        self._graphs = Graphs() if like.is_cuda else Eager()
        self._captured_over = self._pages.store

    def new_cache(self, *, audio: bool) -> PagedCache:  # noqa: ARG002  # a page has all slots
        """An empty cache for one turn."""
        return PagedCache(self._pages)

    def _run(self, company: Company) -> None:
        key = self._paged.width, bool(company.texts), bool(company.audios), company.wanted
        if self._captured_over is not self._pages.store:
            self._graphs.forget()
            self._captured_over = self._pages.store
        self._graphs.run(key, lambda: self._compute(company))

    def _compute(self, company: Company) -> None:
        self._paged.place()
        super()._compute(company)
