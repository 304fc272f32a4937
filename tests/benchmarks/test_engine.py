"""The benchmark of the engine runs, and compares equal work."""

import dataclasses

import pytest
import torch

from benchmarks.engine import LONG, SHORT, Bench, bandwidth, held_by_tensors, prompt_of, report
from benchmarks.engine_chart import draw
from tests.model.tiny_lm import CONFIG, WIDE, random_lm

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(random_lm(dataclasses.replace(WIDE, max_positions=8192)), steps=3)


def test_every_number_is_there_and_drawn(bench: Bench, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.engine.bandwidth", lambda: 10.0)
    found = report(bench, [1, 2], memory_steps=20)
    assert found["decode"].keys() == found["context"].keys() == {"1", "2"}
    assert all(numbers["tokens_per_second_ratio"] > 0 for numbers in found["decode"].values())
    assert found["int8"].keys() == {"1", "2"}
    assert all(numbers["bytes_ratio"] < 1 < 1 + numbers["speed_ratio"] for numbers in found["int8"].values())
    assert all(numbers[f"ms_behind_{length}"] > 0 for numbers in found["context"].values() for length in (SHORT, LONG))
    assert found["context"]["2"]["ms_of_the_bytes"] == found["context"]["2"]["kv_megabytes_more"] / 10
    assert found["memory"]["steps"] == list(range(0, 21, 2))
    draw(found, tmp_path / "engine.svg")
    assert "Memory" in (tmp_path / "engine.svg").read_text()


def test_a_step_keeps_no_tensor(bench: Bench) -> None:
    held = bench.memory(2, 40)["tensor_megabytes"]
    assert held[-1] == held[1]
    kept = torch.zeros(1000, 1000)
    assert held_by_tensors() == pytest.approx(held[-1] + kept.nbytes / 1e6, abs=3)


def test_bandwidth_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.engine.timed", lambda work: 100.0)
    monkeypatch.setattr("benchmarks.engine.LARGE", 1000)
    assert bandwidth() == pytest.approx(4000 / 0.1 / 1e9)


def test_runs_do_not_end_while_they_are_timed(bench: Bench) -> None:
    step, answers = bench.engine(2, prompt_of(9))
    for _ in range(20):
        step()
    assert [answer.tracks.index for answer in answers] == [20 + CONFIG.audio_delay + 1] * 2
    assert not any(answer.over for answer in answers)
    assert not any(answer.waits_for_prefill for answer in answers)
