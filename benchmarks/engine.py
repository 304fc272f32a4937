"""The engine of the language model against its plain twin, in one process, steps of both in turns.

    python -m benchmarks.engine [--model DIR] [--rows 1 4 16] [--steps 60] [--memory-steps 200]
        [--out JSON] [--plot SVG]

Without --model a model of 230 M random parameters, made on the spot. Prints JSON: milliseconds per step at each number
of rows beside those of the plain loop (one row), the ratio in tokens per second, what a step costs behind a long past
beside the time that its keys and values take at the bandwidth measured here, what it costs with int8 weights
(torchao is needed), and what memory does over many steps.
Everything that a step takes is in it: embedding, layers, heads, drawing, the rules of the tracks. One thread, in time
that this thread computed (`time.thread_time`): on a shared machine the wall
clock measures the neighbours. Of each kind of step the first decile is reported.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_chart import draw
from kimia.model.config import LMConfig
from kimia.model.engine import Answer, Engine
from kimia.model.generate import GenerateOptions, TrackTokens, generate
from kimia.model.lm import DualTrackLM, Row, load_lm
from kimia.model.quantize import quantize, weight_bytes
from kimia.model.sampler import Sampling
from kimia.model.turn_cache import TurnCache

RANDOM = LMConfig(
    vocab_size=16000,
    hidden_size=1024,
    intermediate_size=2816,
    layers=12,
    heads=16,
    kv_heads=4,
    max_positions=8192,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mimo_layers=4,
    fork_layer=8,
    audio_delay=6,
    token_offset=12000,
    adaptor_input_dim=512,
    media_begin=11997,
    media_end=11998,
    pad_token=11999,
)
SAMPLING = Sampling.from_arguments(
    {"text_temperature": 0.7, "audio_temperature": 0.8, "audio_top_k": 10, "audio_repetition_penalty": 1.1}
)
LARGE = 1 << 28  # float32 numbers: more than any cache holds
SHORT, LONG = 500, 6000  # positions before the steps whose costs are compared


def random_lm(config: LMConfig) -> DualTrackLM:
    with torch.device("meta"):
        lm = DualTrackLM(config)
    lm = lm.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return lm.eval()


def endless(config: LMConfig) -> TrackTokens:
    """Tracks without an end: every run takes as many steps as it may."""
    return TrackTokens(0, -1, frozenset(), config.token_offset, config.vocab_size, config.audio_delay)


def prompt_of(length: int) -> Row:
    return Row([1 + i % 50 for i in range(length)], [1 + i % 60 for i in range(length)])


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that this thread computed."""
    begin = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - begin)


def decile(times: list[float]) -> float:
    return statistics.quantiles(times, n=10)[0]


def bandwidth() -> float:
    """GB per second that this thread reads from memory: sums of what no cache holds."""
    large = torch.ones(LARGE)
    return large.nbytes / decile([timed(large.sum) for _ in range(12)]) / 1e6


def resident() -> float:
    """Megabytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def held_by_tensors() -> float:
    """Megabytes of all tensors that Python can reach, every storage once."""
    storages = {}
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, torch.Tensor) and not hasattr(kind, "__tensor_flatten__") and found.device.type != "meta":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values()) / 1e6


class Bench:
    """One model, its plain loop and its engines."""

    def __init__(self, lm: DualTrackLM, steps: int) -> None:
        self.lm = lm
        self.steps = steps
        self.tokens = endless(lm.config)
        self.options = GenerateOptions("both", lm.config.max_positions - 7000, SAMPLING)

    def plain(self, prompt: Row) -> Callable[[], object]:
        """One step of the plain loop, behind its prefill and delay."""
        run: Iterator[object] = generate(self.lm, prompt, self.tokens, self.options)
        for _ in range(self.lm.config.audio_delay + 1):
            next(run)
        return lambda: next(run)

    def engine(self, rows: int, prompt: Row) -> tuple[Callable[[], object], list[Answer]]:
        """One step of so many answers, behind their prefill and delay."""
        engine = Engine(self.lm, rows)
        answers = [engine.begin(prompt, self.tokens, replace(self.options, seed=row)) for row in range(rows)]
        for answer in answers:
            while answer.waits_for_prefill:
                engine.prefill(answer)
        for _ in range(self.lm.config.audio_delay + 1):
            engine.step(answers)
        return lambda: engine.step(answers), answers

    def against_the_twin(self, rows: int) -> dict[str, float]:
        prompt = prompt_of(100)
        plain, (engine, _) = self.plain(prompt), self.engine(rows, prompt)
        times: dict[str, list[float]] = {"plain": [], "engine": []}
        for _ in range(self.steps):
            times["plain"].append(timed(plain))
            times["engine"].append(timed(engine))
        plain_ms, engine_ms = decile(times["plain"]), decile(times["engine"])
        return {
            "plain_ms_of_one_row": plain_ms,
            "engine_ms_of_all_rows": engine_ms,
            "tokens_per_second_ratio": rows * plain_ms / engine_ms,
        }

    def against_int8(self, rows: Sequence[int]) -> dict[str, dict[str, float]]:
        """Steps of the engine in turns with those of the same model with quantised weights."""
        small = Bench(copy.deepcopy(self.lm), self.steps)
        quantize(small.lm, "int8")
        return {str(number): self._against(small, number) for number in rows}

    def _against(self, small: Bench, rows: int) -> dict[str, float]:
        steps = {"float": self.engine(rows, prompt_of(100))[0], "int8": small.engine(rows, prompt_of(100))[0]}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.steps):
            for name, step in steps.items():
                times[name].append(timed(step))
        float_ms, int8_ms = decile(times["float"]), decile(times["int8"])
        return {
            "float_ms": float_ms,
            "int8_ms": int8_ms,
            "speed_ratio": float_ms / int8_ms,
            "bytes_ratio": weight_bytes(small.lm) / weight_bytes(self.lm),
        }

    def behind_a_long_past(self, rows: int) -> dict[str, float]:
        """Steps behind SHORT and LONG positions. The past is noise: its content costs nothing."""
        short, long = (self._behind(rows, length) for length in (SHORT, LONG))
        times: dict[int, list[float]] = {SHORT: [], LONG: []}
        for _ in range(self.steps):
            times[SHORT].append(timed(short))
            times[LONG].append(timed(long))
        config = self.lm.config
        per_position = 2 * 4 * config.kv_heads * config.head_dim * (config.layers + config.mimo_layers)
        more = rows * per_position * (LONG - SHORT) / 1e6
        speed = bandwidth()
        return {
            **{f"ms_behind_{length}": decile(found) for length, found in times.items()},
            "ratio": decile(times[LONG]) / decile(times[SHORT]),
            "kv_megabytes_more": more,
            "ms_more": decile(times[LONG]) - decile(times[SHORT]),
            "bandwidth_gb_per_s": speed,
            "ms_of_the_bytes": more / speed,
        }

    def _behind(self, rows: int, length: int) -> Callable[[], object]:
        step, answers = self.engine(rows, prompt_of(2))
        for answer in answers:
            self._fill(answer, length + 2 * self.steps)
            answer.cache.length = length
        return step

    @torch.inference_mode()
    def _fill(self, answer: Answer, room: int) -> None:
        """Noise up to the room, so that all of it is in memory."""
        cache, length = answer.cache, answer.cache.length
        assert isinstance(cache, TurnCache)
        cache.reserve(room)
        cache.length = room - 1
        for seen in cache.next_position()[1]:
            seen[:, :, length:].fill_(0.01)
        cache.length = length

    def memory(self, rows: int, steps: int) -> dict[str, list[float]]:
        """Megabytes of process and tensors after tenths of many steps, within the room that the caches begin with."""
        step, answers = self.engine(rows, prompt_of(100))
        for answer in answers:
            self._fill(answer, answer.cache.length + steps + 1)
        found: dict[str, list[float]] = {"steps": [], "resident_megabytes": [], "tensor_megabytes": []}
        for number in range(steps + 1):
            if number % max(1, steps // 10) == 0:
                gc.collect()
                found["steps"].append(number)
                found["resident_megabytes"].append(resident())
                found["tensor_megabytes"].append(held_by_tensors())
            step()
        return found


def report(bench: Bench, rows: list[int], memory_steps: int) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in bench.lm.parameters())
    return {
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "decode": {str(number): bench.against_the_twin(number) for number in rows},
        "context": {str(number): bench.behind_a_long_past(number) for number in (rows[0], rows[-1])},
        "memory": bench.memory(rows[-1], memory_steps),
        "int8": bench.against_int8((rows[0], rows[-1])),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Steps of the engine against those of the plain loop, as JSON.")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: random weights of 230 M parameters)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each kind")
    parser.add_argument("--memory-steps", type=int, default=200, help="steps over which memory is watched")
    parser.add_argument("--out", type=Path, help="write the JSON there, too")
    parser.add_argument("--plot", type=Path, help="draw it as SVG or PNG")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    args = parse()
    torch.set_num_threads(1)
    dtype = torch.float32
    lm = random_lm(RANDOM) if args.model is None else load_lm(args.model, device="cpu", dtype=dtype)
    found = report(Bench(lm, args.steps), args.rows, args.memory_steps)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
