"""The step over pages against the step turn by turn; what a graph relies on; the graph itself where there is CUDA."""

import contextlib
import gc
import math

import pytest
import torch

from kimia.model import attention, paged
from kimia.model.engine import Engine
from kimia.model.fused import Wanted
from kimia.model.generate import generate
from kimia.model.lm import DualTrackLM, Row
from kimia.model.paged import Graphs, PagedCache, PagedLM, Pages
from kimia.model.prefix import Prefixes
from kimia.model.quantize import SCHEMES, quantize
from tests.model.test_attention import documented_flash  # noqa: F401  # a fixture
from tests.model.test_engine import PROMPT, begun, ids, options, run
from tests.model.tiny_lm import TOKENS, WIDE, random_lm, random_row

pytestmark = pytest.mark.parity

LENGTHS = (5, 1, 30, 16)  # of the prompts: a turn that fills its pages, one that has just begun
BOTH = Wanted(text=True, audio=True)


class Recorded:
    """In place of the graphs: what they are asked for. Works twice, as capturing does."""

    def __init__(self) -> None:
        self.keys = []
        self.forgotten = 0

    def run(self, key, work) -> None:
        self.keys.append(key)
        work()
        work()

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture(scope="module")
def lm() -> DualTrackLM:
    return random_lm(WIDE, seed=3)


@pytest.fixture(autouse=True)
def short_pages(monkeypatch):
    monkeypatch.setattr(paged, "PAGE", 4)
    monkeypatch.setattr(paged, "FIRST_PAGES", 2)


def paged_engine(lm: DualTrackLM, rows: int) -> Engine:
    engine = Engine(lm, rows)
    engine._fused = PagedLM(lm, rows)
    return engine


def run_beside(lm: DualTrackLM, engine: Engine, steps: int, tolerance: float) -> None:
    """The same turns in the engine and turn by turn: all logits of all steps are close."""
    both = engine, Engine(lm, engine.rows)
    turns = [[begun(each, random_row(length, seed=length), seed=length) for length in LENGTHS] for each in both]
    for step in range(steps):
        order = [(step + place) % len(LENGTHS) for place in range(len(LENGTHS) - step % 2)]
        found, expected = (
            each._fused.step([answers[at].feed() for at in order], BOTH)[:, : len(order)].float()
            for each, answers in zip(both, turns, strict=True)
        )
        torch.testing.assert_close(found, expected.to(found.device), atol=tolerance, rtol=0)
        for answers in turns:
            for at in order:
                answers[at]._feed = (50 + at, step)


# ---- against turn by turn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_give_the_logits_of_the_step_turn_by_turn(scheme) -> None:
    lm = random_lm(WIDE, seed=3)
    quantize(lm, scheme)
    run_beside(lm, paged_engine(lm, 5), 8, 5e-5)


@pytest.mark.parametrize("flash", [False, True])
def test_logits_are_those_of_the_step_turn_by_turn(lm, flash, request, monkeypatch):
    if flash:
        request.getfixturevalue("documented_flash")
        monkeypatch.setattr(paged, "flash_fits", attention.flash_fits)
    run_beside(lm, paged_engine(lm, 5), 12, 5e-5)


@pytest.mark.parametrize("more", [{}, {"output_type": "text"}, {"forced_text": (7, 8, 9)}], ids=["both", "text", "say"])
def test_ids_are_those_of_the_plain_loop(lm, more):
    engine = paged_engine(lm, 3)
    others = [begun(engine, random_row(40, seed=n), seed=n) for n in range(2)]
    steps, *_ = run(engine, [begun(engine, seed=2, **more), *others])
    assert ids(steps) == ids(list(generate(lm, PROMPT, TOKENS, options(seed=2, **more))))


# ---- what a graph relies on -------------------------------------------------------------------------------------


def test_a_step_can_be_repeated_and_reads_nothing_but_its_buffers(lm):
    """Capturing runs a step more than once, and later steps run over what earlier ones left: no bit changes."""
    once, twice = paged_engine(lm, 4), paged_engine(lm, 4)
    twice._fused._graphs = Recorded()
    turns = [
        [begun(each, random_row(length, seed=length), seed=length) for length in LENGTHS] for each in (once, twice)
    ]
    for _ in range(6):
        made = [
            each._fused.step([a.feed() for a in answers], BOTH)
            for each, answers in zip((once, twice), turns, strict=True)
        ]
        assert torch.equal(*made)
        twice._fused._scratch.x.fill_(1e9)  # stale numbers are overwritten, not read
        twice._fused._scratch.heads.fill_(1e9)


def test_buffers_and_weights_stay_where_they_are(lm):
    fused = PagedLM(lm, 2)
    engine = Engine(lm, 2)
    engine._fused = fused
    answers = [begun(engine, seed=n) for n in range(2)]
    tensors = {**vars(fused._scratch), **vars(fused._paged)}
    before = {name: value.data_ptr() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    engine.step(answers)
    engine.step(answers[:1])
    tensors = {**vars(fused._scratch), **vars(fused._paged)}
    assert before == {name: value.data_ptr() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    assert len(before) > 15


def test_a_graph_for_each_width_and_each_set_of_branches(lm):
    engine = paged_engine(lm, 3)
    graphs = engine._fused._graphs = Recorded()
    text = begun(engine, random_row(2, seed=1), output_type="text")
    both = begun(engine, random_row(9, seed=2))
    engine.step([text])
    engine.step([text])
    assert graphs.keys == [(1, True, False, Wanted(text=True, audio=False))] * 2
    engine.step([both, text])
    assert graphs.keys[-1] == (4, True, True, Wanted(text=True, audio=False))  # 9 positions: 3 pages, 4 to look at
    forgotten = graphs.forgotten
    begun(engine, random_row(200, seed=3))
    engine.step([both])
    assert graphs.forgotten == forgotten + 1  # the pool has moved
    assert begun(engine, PROMPT).cache.nbytes == engine._fused._pages.store[:, :, 0].nbytes * 23  # 89 of 90 positions


# ---- pages ------------------------------------------------------------------------------------------------------


def test_pages_are_free_again_when_their_turn_is_forgotten():
    pages = Pages(2, 1, 8, 6, torch.zeros(1))
    cache, other = PagedCache(pages), PagedCache(pages)
    cache.reserve(9)
    other.reserve(1)
    assert sorted([*cache.table, *other.table, *pages.free]) == [1, 2, 3, 4, 5]
    assert len(cache.table) == 3
    del cache
    gc.collect()
    assert sorted([*other.table, *pages.free]) == [1, 2, 3, 4, 5]


def test_pages_behind_a_cut_are_free_again():
    pages = Pages(2, 1, 8, 6, torch.zeros(1))
    cache = PagedCache(pages)
    cache.reserve(12)
    cache.advance(11)
    cache.cut(5)
    assert (cache.length, len(cache.table), len(pages.free)) == (5, 2, 3)
    cache.cut(9)
    assert cache.length == 5
    del cache
    assert sorted(pages.free) == [1, 2, 3, 4, 5]


def test_a_conversation_goes_on_in_its_pages(lm):
    engine = paged_engine(lm, 2)
    engine.prefixes = Prefixes(limit=10**9)
    engine.piece = 8
    first = engine.begin(PROMPT, TOKENS, options(max_steps=3), "a")
    while first.waits_for_prefill:
        engine.prefill(first)
    run(engine, [first])
    engine.keep(first)
    longer = Row((*PROMPT.audio_ids, 50, 51), (*PROMPT.text_ids, 1, 2), PROMPT.segments, PROMPT.features)
    again = engine.begin(longer, TOKENS, options(seed=4), "a")
    while again.waits_for_prefill:
        engine.prefill(again)
    assert again.reused == 88
    [steps] = run(engine, [again])
    assert ids(steps) == ids(list(generate(lm, longer, TOKENS, options(seed=4))))


def test_the_pool_grows_with_what_it_holds():
    pages = Pages(2, 1, 8, 2, torch.zeros(1))
    cache = PagedCache(pages)
    cache.reserve(4)
    k = torch.randn(1, 1, 4, 8)
    cache.append(1, k, -k, torch.arange(4)[None], (4,))
    cache.advance(4)
    cache.reserve(9)
    assert pages.store.shape[2] == 4
    keys, values = cache.append(1, k[:, :, :1], k[:, :, :1], torch.tensor([[4]]), (1,))
    assert torch.equal(keys, torch.cat([k, k[:, :, :1]], dim=2))
    assert torch.equal(values[:, :, :4], -k)


def test_what_a_broken_turn_leaves_reaches_nobody(lm):
    engine = paged_engine(lm, 2)
    broken = begun(engine, random_row(6, seed=1))
    engine._fused._pages.store[:, :, [paged.NOBODY, *broken.cache.table]] = math.nan
    good = begun(engine, random_row(10, seed=2), seed=2)  # three pages; a step looks at four
    assert engine._fused.step([good.feed(), broken.feed()], BOTH)[:, 0].isfinite().all()
    del broken
    later = begun(engine, random_row(7, seed=2), seed=2)
    assert engine._fused.step([later.feed()], BOTH)[:, 0].isfinite().all()


# ---- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_what_the_step_gives(dtype, monkeypatch):
    """Bit by bit, with widths, branches and the pool changing; and float32 is close to the step on the CPU."""
    monkeypatch.setattr(paged, "PAGE", 256)
    lm = random_lm(WIDE, seed=3).to("cuda", dtype)
    graphed, eager = Engine(lm, 4), Engine(lm, 4)
    assert isinstance(graphed._fused._graphs, Graphs)
    eager._fused._graphs = paged.Eager()
    turns = [
        [begun(each, random_row(length, seed=length), seed=length) for length in (5, 250, 300, 16)]
        for each in (graphed, eager)
    ]
    for step in range(12):
        found, expected = (
            each._fused.step([answer.feed() for answer in answers[step % 3 :]], BOTH)[:, : 4 - step % 3]
            for each, answers in zip((graphed, eager), turns, strict=True)
        )
        assert torch.equal(found, expected)
    if dtype == torch.float32:
        run_beside(random_lm(WIDE, seed=3), Engine(lm, 5), 12, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and attention.FLASH_INSTALLED), reason="needs CUDA and flash-attn")
def test_flash_in_pages_equals_gathering(monkeypatch):
    monkeypatch.setattr(paged, "PAGE", 256)
    lm = random_lm(WIDE, seed=3).to("cuda", torch.bfloat16)
    engine, gathering = Engine(lm, 4), Engine(lm, 4)
    turns = [[begun(each, random_row(length, seed=length)) for length in (5, 300)] for each in (engine, gathering)]
    fast = engine._fused.step([answer.feed() for answer in turns[0]], BOTH)[:, :2]
    monkeypatch.setattr(paged, "flash_fits", lambda q: False)
    plain = gathering._fused.step([answer.feed() for answer in turns[1]], BOTH)[:, :2]
    torch.testing.assert_close(fast, plain, atol=5e-2, rtol=5e-2)


def test_a_graph_is_captured_at_the_priority_of_its_thread_whatever_other_threads_do(monkeypatch) -> None:
    """Looked at from outside, with what stands for CUDA: no capture has been run with other stages beside it."""
    asked, here = {}, type("Here", (), {"priority": -3, "wait_stream": lambda *_: None})()

    class Stream:
        def __init__(self, priority=0):
            self.priority, self.wait_stream = priority, lambda _: None

    def capture(graph, **how):
        asked.update(how)
        return contextlib.nullcontext()

    replayed = []

    class Graph:
        def replay(self):
            replayed.append(self)

    for name, stand_in in {
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda: here,
        "Stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    work = []
    Graphs().run("key", lambda: work.append(1))
    assert len(work) == 2  # once beside the graph
    assert len(replayed) == 1
    assert asked["stream"].priority == -3
    assert (asked["pool"], asked["capture_error_mode"]) == ("pool", "thread_local")
