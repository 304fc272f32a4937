"""Segments of many turns: who comes next, what goes together, and what becomes of failures."""

import asyncio
import threading

import pytest
import torch

from kimia.compute import ComputeThread
from kimia.model import encode
from kimia.model.audio import cut
from kimia.model.encode import EncodedAudio
from services.tokenizer.scheduler import Scheduler
from tests.model.plain_encoder import speech_like

pytestmark = pytest.mark.unit


class Encoder:
    """Notes the lengths of what is evaluated together."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches = []
        self.broken = ()

    def encode_segments(self, batch):
        lengths = [len(segment.samples) for segment in batch]
        self.batches.append(lengths)
        if set(lengths) & set(self.broken):
            raise MemoryError("too much")
        return [EncodedAudio((length,), torch.zeros(1, 2)) for length in lengths]

    def codes_of_segments(self, batch):
        self.batches.append([-len(segment.samples) for segment in batch])
        return [(len(segment.samples),) for segment in batch]


@pytest.fixture
def compute():
    thread = ComputeThread()
    yield thread
    thread.close()


def segments(length, count):
    return cut(speech_like(length * count), length)


async def results(jobs):
    return [(await job.encoded).codes[0] for job in jobs]


async def test_nobodys_second_segment_comes_before_anybodys_first(compute):
    scheduler = Scheduler(encoder := Encoder(), compute)
    long = scheduler.submit(segments(10, 4), heard=True)
    short = scheduler.submit(segments(20, 1), heard=True)
    await long[1].encoded
    late = scheduler.submit(segments(30, 2), heard=True)
    assert await asyncio.gather(results(long), results(short), results(late)) == [[10] * 4, [20], [30] * 2]
    assert encoder.batches[:3] == [[10], [20], [10]]
    assert encoder.batches[3:] in ([[30], [10], [30], [10]], [[10], [30], [10], [30]])
    assert all(job.seconds > 0 for job in long)


async def test_where_it_pays_segments_of_one_kind_go_together(compute, monkeypatch):
    monkeypatch.setitem(encode.SEGMENTS_AT_ONCE, "cpu", 3)
    scheduler = Scheduler(encoder := Encoder(), compute)
    turns = [scheduler.submit(segments(length, 2), heard=length != 5) for length in (4, 5, 6)]
    assert await asyncio.gather(*map(results, turns)) == [[4, 4], [5, 5], [6, 6]]
    assert encoder.batches == [[4, 6, 4], [-5, -5], [6]]


async def test_what_is_withdrawn_is_not_computed(compute):
    scheduler = Scheduler(encoder := Encoder(), compute)
    jobs = scheduler.submit(segments(10, 3), heard=True)
    await jobs[0].encoded
    scheduler.withdraw(jobs)
    assert await results(scheduler.submit(segments(20, 1), heard=True)) == [20]
    assert encoder.batches in ([[10], [20]], [[10], [10], [20]])  # one may have begun


async def test_a_failure_is_its_own_evaluations_alone(compute):
    scheduler = Scheduler(encoder := Encoder(), compute)
    encoder.broken = (10,)
    bad, good = scheduler.submit(segments(10, 2), heard=True), scheduler.submit(segments(20, 1), heard=True)
    with pytest.raises(MemoryError):
        await bad[0].encoded
    assert await results(good) == [20]
    scheduler.withdraw(bad)
    encoder.broken = ()
    assert await results(scheduler.submit(segments(10, 1), heard=True)) == [10]


async def test_features_are_fetched_from_the_device_in_the_thread_that_made_them(compute):
    class Rows:
        """Stands for features on a GPU: where they are fetched from it."""

        def cpu(self):
            return threading.get_ident()

    encoder = Encoder()
    encoder.encode_segments = lambda batch: [EncodedAudio((1,), Rows()) for _ in batch]
    [job] = Scheduler(encoder, compute).submit(segments(10, 1), heard=True)
    assert (await job.encoded).features == await compute.turn().run(threading.get_ident)
