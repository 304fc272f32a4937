"""The detokenizer: going on behind another worker, and chunks of several turns together, against their plain twins.

    python -m benchmarks.detokenizer take-over [--sizes smallest,tiny,150m] [--seconds 6,24] [--repeats 5]
    python -m benchmarks.detokenizer engine [--sizes smallest,tiny,150m] [--turns 1,8] [--chunks steady,first]
        [--points 30] [--repeats 5]

prints JSON. Weights are random; `150m` has a flow model of 151 million parameters and the vocoder
of `tiny`. Every repeat runs both ways one after the other; medians, and the ratio of each pair.

take_over   after so many seconds of speech: `restore` against synthesising the same pushes again, in ms, and the
            bytes of mel that must be fetched
engine      one chunk of each of so many turns, commit included, in ms of processor time: `FlowEngine`, behind
            `FlowCache`s, at most 492 frames in one evaluation, or one chunk (`alone`, as the service does on a CPU);
            one after the other by `solve`, the plain twin; and as the release does it: a modulation for every
            repeated frame, times embedded and the prefix copied in every step. `steady`: 41 tokens behind a full
            window of 900 mel frames; `first`: 10 tokens behind nothing. `parts`: the engine's time by operator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kimia.model.attention import attention
from kimia.model.checkpoint import open_checkpoint
from kimia.model.checkpoint_presets import PRESETS as CHECKPOINTS
from kimia.model.chunking import Push, pushes
from kimia.model.detokenize import UPSAMPLE, Detokenizer
from kimia.model.dit import Chunk, DiT, Prefix
from kimia.model.flow import TimeGrid, commit, solve, time_grid
from kimia.model.flow_cache import FlowCache
from kimia.model.flow_engine import FlowEngine, Solving
from kimia.model.presets import LOW_LATENCY, Preset
from kimia.model.prompt import TOKEN_RATE
from kimia.model.random_weights import new_checkpoint

SIZES: dict[str, dict[str, Any]] = {
    "smallest": {
        "flow": {"hidden_size": 64, "depth": 2, "num_heads": 2},
        "vocoder": {
            "upsample_initial_channel": 128,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
        },
    },
    "tiny": {},
    "150m": {"flow": {"hidden_size": 1024, "depth": 8, "num_heads": 16}},
}
FRAMES_AT_ONCE = 492  # three steady chunks


def random_detokenizer(size: str) -> Detokenizer:
    """The detokenizer of a checkpoint that is `tiny` but for it, float32 on the CPU."""
    CHECKPOINTS[size] = replace(CHECKPOINTS["tiny"], **SIZES[size])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(str(new_checkpoint(f"{folder}/model", size)))
        return Detokenizer.load(checkpoint, "cpu", torch.float32)


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


# ---- take-over --------------------------------------------------------------------------------------------------


def take_over(detokenizer: Detokenizer, seconds: float, repeats: int) -> dict[str, Any]:
    """Both ways to stand behind so many seconds of speech."""
    preset = LOW_LATENCY
    codes = [index % detokenizer.codes for index in range(round(seconds * TOKEN_RATE))]
    made = [push for push in pushes(preset, codes) if not push.final]
    synthesis, mels = detokenizer.stream(preset, seed=1), []
    for push in made:
        synthesis.push(push.tokens)
        assert synthesis.report is not None
        assert synthesis.report.committed is not None
        mels.append(synthesis.report.committed)
    pairs = []
    for _ in range(repeats):
        restored = milliseconds(lambda: detokenizer.stream(preset, seed=1).restore(made, mels))
        pairs.append((restored, milliseconds(lambda: _again(detokenizer, preset, made))))
    return {
        "pushes": len(made),
        "mel_bytes": sum(mel.numel() * mel.element_size() for mel in mels),
        "restored_ms": round(statistics.median(restored for restored, _ in pairs), 1),
        "synthesised_again_ms": round(statistics.median(again for _, again in pairs), 1),
        "ratio": round(statistics.median(again / restored for restored, again in pairs), 1),
    }


def _again(detokenizer: Detokenizer, preset: Preset, made: list[Push]) -> None:
    synthesis = detokenizer.stream(preset, seed=1)
    for push in made:
        synthesis.push(push.tokens)


# ---- engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Released(Chunk):
    """A chunk whose prefix is copied before every attention."""

    prefix: Prefix

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Chunk.attend."""
        keys, values = torch.cat([self.prefix.keys[layer], k], 2), torch.cat([self.prefix.values[layer], v], 2)
        return attention(q, keys, values, self.visible)


class Engines:
    """One chunk of each of some turns, and the ways to solve it."""

    def __init__(self, dit: DiT, turns: int, grid: TimeGrid, steady: bool) -> None:
        torch.manual_seed(1)
        config = dit.config
        self.dit = dit
        self.grid = grid
        self.start = LOW_LATENCY.kv_window if steady else 0
        self.kept = LOW_LATENCY.commits[-1 if steady else 0]
        self.ids = torch.arange(self.kept + LOW_LATENCY.look_ahead)[None]
        shape = (config.depth, 1, config.heads, self.start, config.head_dim)
        self.prefixes = [Prefix(torch.randn(shape), torch.randn(shape)) for _ in range(turns)]
        self.noises = [torch.randn(1, self.ids.numel() * UPSAMPLE, config.mel_bins) for _ in range(turns)]
        self.caches = []
        for prefix in self.prefixes:
            cache = FlowCache(dit.empty_prefix(), LOW_LATENCY.kv_window, 8 * self.ids.numel())
            cache.hear(prefix)
            self.caches.append(cache)

    def engine(self, frames: int) -> list[Tensor]:
        """By FlowEngine, so many frames in one evaluation."""
        flow, solvings, size = FlowEngine(self.dit), [], self.ids.numel() * UPSAMPLE
        for cache, noise in zip(self.caches, self.noises, strict=True):
            chunk = self.dit.chunk_within(self.ids, UPSAMPLE, self.start, cache.room(size))
            solvings.append(Solving(chunk, noise, self.grid, self.kept, commits=True))
        while left := [solving for solving in solvings if not solving.done]:
            flow.advance(left[: max(1, frames // size)])
        return [solving.x for solving in solvings]

    def plain_twin(self) -> list[Tensor]:
        """One after the other; the prefix is copied once a chunk, a modulation is that of a token."""
        return self._one_by_one(UPSAMPLE)

    def frame_by_frame(self) -> list[Tensor]:
        """The same with a modulation for every frame."""
        return self._one_by_one(1)

    def _one_by_one(self, repeat: int) -> list[Tensor]:
        found, kept = [], self.kept * UPSAMPLE
        spread = self.ids.repeat_interleave(UPSAMPLE // repeat, 1)
        for prefix, noise in zip(self.prefixes, self.noises, strict=True):
            chunk = self.dit.chunk(spread, repeat, self.start, prefix)
            found.append(solve(self.dit, noise, chunk, self.grid)[:, :kept])
            commit(self.dit, found[-1], chunk.head(kept // repeat))
        return found

    def as_released(self) -> list[Tensor]:
        """One after the other; nothing is kept from one step to the next."""
        found, kept = [], self.kept * UPSAMPLE
        spread = self.ids.repeat_interleave(UPSAMPLE, 1)
        for prefix, noise in zip(self.prefixes, self.noises, strict=True):
            chunk = Released(**vars(self.dit.chunk(spread, 1, self.start, prefix)), prefix=prefix)
            x = noise
            for index, size in zip(self.grid.indices, self.grid.sizes, strict=True):
                x = x + size * self.dit(x, self.dit.embed_times((index,)), chunk)
            found.append(x[:, :kept])
            commit(self.dit, found[-1], chunk.head(kept))
        return found

    def measured(self, repeats: int) -> dict[str, Any]:
        """All ways, interleaved."""
        ways: dict[str, Callable[[], list[Tensor]]] = {
            "engine": lambda: self.engine(FRAMES_AT_ONCE),
            "alone": lambda: self.engine(1),
            "plain_twin": self.plain_twin,
            "frame_by_frame": self.frame_by_frame,
            "as_released": self.as_released,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            mels = {name: torch.cat(way()) for name, way in ways.items()}
            for _ in range(repeats):
                for name, way in ways.items():
                    times[name].append(processor_milliseconds(way))
            parts = _parts(ways["engine"])
        slower = list(ways)[2:]
        fast = min(times["engine"], times["alone"], key=statistics.median)
        return {
            **{f"{name}_ms": round(statistics.median(spent), 1) for name, spent in times.items()},
            **{f"{name}_over_engine": round(_ratio(times[name], fast), 2) for name in slower},
            "largest_difference_of_mels": float((mels["engine"] - mels["frame_by_frame"]).abs().max()),
            "parts": parts,
        }


def processor_milliseconds(run: Callable[[], object]) -> float:
    """Of one call: time in which others have the processor does not count."""
    begin = time.process_time()
    run()
    return 1e3 * (time.process_time() - begin)


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def _parts(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the operators that take more than 2 %."""
    with torch.profiler.profile() as profile:
        run()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    whole = sum(spent.values())
    largest = sorted(spent, key=lambda name: -spent[name])
    return {name: round(spent[name] / whole, 3) for name in largest if spent[name] > 0.02 * whole}


# ---- command ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["take-over", "engine"])
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--seconds", default="6,24")
    parser.add_argument("--turns", default="1,8")
    parser.add_argument("--chunks", default="steady,first")
    parser.add_argument("--points", type=int, default=LOW_LATENCY.ode_points)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for size in args.sizes.split(","):
        detokenizer = random_detokenizer(size)
        found[size] = {"flow_parameters": sum(tensor.numel() for tensor in detokenizer.dit.parameters())}
        if args.what == "take-over":
            found[size] |= {f"{s} s": take_over(detokenizer, float(s), args.repeats) for s in args.seconds.split(",")}
        else:
            grid = time_grid(args.points)
            for kind in args.chunks.split(","):
                found[size][kind] = {
                    n: Engines(detokenizer.dit, int(n), grid, kind == "steady").measured(args.repeats)
                    for n in args.turns.split(",")
                }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
