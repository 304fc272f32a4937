"""Whose sound is made next, with whom, and what becomes of a rendering that fails or is not wanted."""

import asyncio
from dataclasses import replace

import pytest
import torch

from kimia.compute import ComputeThread
from kimia.model.presets import LOW_LATENCY
from services.detokenizer.rendering import Renderer, most_urgent_alike
from tests.model.tiny_detokenizer import FLOW, random_detokenizer

pytestmark = pytest.mark.parity

QUICK = replace(LOW_LATENCY, ode_points=3)


def codes(count: int, start: int = 0) -> list[int]:
    return [(start + 3 * index) % FLOW.audio_codes for index in range(count)]


@pytest.fixture
def renderer():
    thread = ComputeThread()
    yield Renderer(random_detokenizer(), thread)
    thread.close()


def solved(renderer: Renderer, seed: int, count: int = 10):
    stream = renderer.detokenizer.stream(QUICK, seed)
    begun = stream.begin(codes(count, seed), final=True)
    if begun.solving:
        renderer.detokenizer.engine.solve(begun.solving)
    return stream, begun


class Batches(list):
    """The mels of every call of the vocoder, (B, F)."""

    def __init__(self, renderer: Renderer, fails: int = 0) -> None:
        super().__init__()
        self.fails = fails
        self.vocoder = renderer.detokenizer.vocoder
        self.config = self.vocoder.config
        renderer.detokenizer = replace(renderer.detokenizer, vocoder=self)

    def __call__(self, mels):
        self.append((mels.shape[0], mels.shape[2]))
        if len(self) == self.fails:
            raise MemoryError("too much")
        return self.vocoder(mels)


@pytest.mark.parametrize(("most", "error"), [(1, 0.0), (8, 1e-5)], ids=["as on a CPU", "together"])
async def test_everybody_hears_its_own(renderer, most, error):
    """Mels of equal length in one call, where that is wanted."""
    renderer._most = most
    counts = [10, 10, 7, 10]
    expected = [renderer.detokenizer.stream(QUICK, s).push(codes(n, s), final=True) for s, n in enumerate(counts)]
    turns = [solved(renderer, seed, count) for seed, count in enumerate(counts)]
    batches = Batches(renderer)
    got = await asyncio.gather(*(renderer.render(*turn, due=float(at)) for at, turn in enumerate(turns)))
    assert sorted(batches) == ([(1, 28), (1, 40), (1, 40), (1, 40)] if most == 1 else sorted(batches))
    assert sum(size for size, _ in batches) == 4
    for (pcm, seconds), wave in zip(got, expected, strict=True):
        assert (pcm - wave).abs().max() <= error
        assert seconds > 0


async def test_who_waits_together_is_rendered_together(renderer):
    renderer._most = 8
    turns = [solved(renderer, seed) for seed in range(4)]
    batches, blocked = Batches(renderer), asyncio.Event()
    loop = asyncio.get_running_loop()
    busy = asyncio.create_task(
        renderer.thread.turn().run(lambda: asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result(10))
    )
    await asyncio.sleep(0)
    renderings = [asyncio.create_task(renderer.render(*turn, due=0.0)) for turn in turns]
    await asyncio.sleep(0)
    blocked.set()
    await asyncio.gather(busy, *renderings)
    assert batches == [(4, 40)]


async def test_a_turn_without_anything_to_render_ends(renderer):
    pcm, _ = await renderer.render(*solved(renderer, 1, count=0), due=0.0)
    assert pcm.shape == (0,)


async def test_a_failure_is_that_of_its_batch_alone(renderer):
    batches = Batches(renderer, fails=1)
    first, second = [renderer.render(*solved(renderer, seed), due=0.0) for seed in range(2)]
    failed, (pcm, _) = await asyncio.gather(first, second, return_exceptions=True)
    assert isinstance(failed, MemoryError)
    assert len(pcm)
    assert len(batches) == 2


async def test_who_leaves_is_not_rendered(renderer):
    batches, loop, blocked = Batches(renderer), asyncio.get_running_loop(), asyncio.Event()
    busy = asyncio.create_task(
        renderer.thread.turn().run(lambda: asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result(10))
    )
    await asyncio.sleep(0)
    leaving = asyncio.create_task(renderer.render(*solved(renderer, 1), due=0.0))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    blocked.set()
    await busy
    assert len((await renderer.render(*solved(renderer, 2), due=1.0))[0])
    assert len(batches) == 1


def test_the_most_urgent_decides_the_length():
    class Due:
        def __init__(self, due, frames):
            self.due = due
            self.frames = frames

    waiting = [Due(3, 10), Due(1, 60), Due(2, 10), Due(4, 60), Due(5, 60)]
    assert [one.due for one in most_urgent_alike(waiting, 8)] == [1, 4, 5]
    assert [one.due for one in most_urgent_alike(waiting, 2)] == [1, 4]
    assert most_urgent_alike([], 8) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
async def test_on_a_stream_of_its_own():
    cpu = random_detokenizer()
    expected = cpu.stream(QUICK, 1).push(codes(10, 1), final=True)
    thread = ComputeThread()
    renderer = Renderer(replace(cpu, dit=cpu.dit.to("cuda"), vocoder=cpu.vocoder.to("cuda")), thread)
    got = await asyncio.gather(*(renderer.render(*solved(renderer, 1), due=0.0) for _ in range(4)))
    thread.close()
    assert all((pcm - expected).abs().max() <= 1e-3 for pcm, _ in got)
