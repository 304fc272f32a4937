"""The compute thread, features as bytes, and what is read from settings."""

import asyncio
import threading

import pytest
import torch

from kimia.compute import ComputeThread, cut_off, feature_bytes, feature_rows, open_model, own_stream, replayed
from kimia.errors import AudioError, CheckpointError, ParameterError
from kimia.runtime.settings import Settings
from kimia.v1.turn_pb2 import (
    FEATURE_TYPE_BF16,
    FEATURE_TYPE_F16,
    FEATURE_TYPE_F32,
    FEATURE_TYPE_UNSPECIFIED,
    Chunk,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def thread():
    made = ComputeThread(1)
    yield made
    made.close()


# ---- the thread -------------------------------------------------------------------------------------------------


async def test_everything_runs_in_one_thread_beside_the_loop_without_gradients(thread: ComputeThread) -> None:
    def look(value: int, *, more: int) -> tuple[int, int, bool]:
        return value + more, threading.get_ident(), torch.is_inference_mode_enabled()

    one, two = await asyncio.gather(*(thread.turn().run(look, 1, more=more) for more in (1, 2)))
    assert (one[0], two[0]) == (2, 3)
    assert one[1] == two[1] != threading.get_ident()
    assert one[2]
    assert not torch.is_inference_mode_enabled()


async def test_turns_take_the_thread_in_order_of_arrival(thread: ComputeThread) -> None:
    order = []

    async def turn(name: str) -> None:
        compute = thread.turn()
        for _ in range(3):
            await compute.run(order.append, name)

    await asyncio.gather(turn("a"), turn("b"))
    assert order == ["a", "b"] * 3


async def test_who_is_cancelled_leaves_the_queue(thread: ComputeThread) -> None:
    begun, release, ran = threading.Event(), threading.Event(), []

    def wait() -> None:
        begun.set()
        release.wait(10)

    first = asyncio.create_task(thread.turn().run(wait))
    await asyncio.to_thread(begun.wait, 10)
    second = asyncio.create_task(thread.turn().run(ran.append, "second"))
    third = asyncio.create_task(thread.turn().run(ran.append, "third"))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    release.set()
    await asyncio.gather(first, third)
    assert ran == ["third"]
    assert second.cancelled()


async def test_errors_arrive_and_seconds_count_what_ran(thread: ComputeThread) -> None:
    def fail() -> None:
        raise AudioError("no")

    compute, other = thread.turn(), thread.turn()
    with pytest.raises(AudioError, match="no"):
        await compute.run(fail)
    assert compute.seconds > 0
    assert other.seconds == 0


# ---- features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, FEATURE_TYPE_F32), (torch.bfloat16, FEATURE_TYPE_BF16), (torch.float16, FEATURE_TYPE_F16)],
)
def test_features_come_back_bit_for_bit(dtype: torch.dtype, kind: int) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    data = feature_bytes(rows[1:4])
    assert len(data) == 3 * 7 * dtype.itemsize
    again = feature_rows(data, kind, 7)
    assert again.dtype == dtype
    assert torch.equal(again, rows[1:4])


def test_bytes_are_little_endian() -> None:
    assert feature_bytes(torch.tensor([[1.0]])) == b"\x00\x00\x80\x3f"
    assert feature_bytes(torch.tensor([[1.0]], dtype=torch.bfloat16)) == b"\x80\x3f"


@pytest.mark.parametrize(
    ("data", "kind", "width", "rule"),
    [
        (b"", FEATURE_TYPE_F32, 2, "missing"),
        (bytes(12), FEATURE_TYPE_F32, 2, "whole rows"),
        (bytes(8), FEATURE_TYPE_F32, 0, "whole rows"),
        (bytes(8), FEATURE_TYPE_UNSPECIFIED, 2, "not known"),
    ],
)
def test_bytes_that_are_no_features(data: bytes, kind: int, width: int, rule: str) -> None:
    with pytest.raises(AudioError, match=rule):
        feature_rows(data, kind, width)


# ---- settings ---------------------------------------------------------------------------------------------------


def test_a_model_is_opened_as_the_settings_say(tiny) -> None:
    place = open_model(Settings(model=str(tiny), device="cpu", dtype="bfloat16"))
    assert place.checkpoint.root == tiny
    assert (place.device, place.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert place.configs.flow is None
    whole = open_model(Settings(model=str(tiny), device="cpu"), detokenizer=True)
    assert whole.configs.flow is not None
    assert whole.dtype == torch.float32


def test_a_wrong_device_or_model_is_told(tiny, tmp_path) -> None:
    with pytest.raises(ParameterError, match="device"):
        open_model(Settings(model=str(tiny), device="gpu"))
    with pytest.raises(CheckpointError):
        open_model(Settings(model=str(tmp_path / "nowhere")))


async def test_a_log_is_replayed_in_its_order() -> None:
    log = [Chunk(index=index) for index in range(3)]
    assert [chunk async for chunk in replayed(*log)] == log


def test_a_log_that_is_cut_off_is_named() -> None:
    assert "`encoded`" in str(cut_off("encoded"))


# ---- streams ----------------------------------------------------------------------------------------------------


class Stream:
    """What stands for a stream where there is no CUDA."""

    def __init__(self, device, priority=0):
        self.device, self.priority, self.waited_for = device, priority, []

    @staticmethod
    def priority_range():
        return 0, -3

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_the_urgent_stage_has_the_stream_of_the_highest_priority(monkeypatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
    device = torch.device("cuda", 0)
    urgent, other, another = own_stream(device, urgent=True), own_stream(device), own_stream(device)
    least, greatest = torch.cuda.Stream.priority_range()
    assert (urgent.priority, other.priority, another.priority) == (greatest, least, least)
    assert urgent.priority < other.priority
    assert other is not another
    assert urgent.device == device
    assert own_stream(torch.device("cpu"), urgent=True) is None


async def test_a_thread_computes_in_its_stream_behind_what_was_loaded(monkeypatch) -> None:
    entered: list[tuple[int, object]] = []
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: entered.append((threading.get_ident(), stream)))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    stream = Stream("cuda:1")
    thread = ComputeThread(stream=stream)
    where = [await thread.turn().run(threading.get_ident) for _ in range(2)]
    thread.close()
    assert entered == [(where[0], stream)]  # once, for the life of the thread
    assert stream.waited_for == ["default of cuda:1"]
