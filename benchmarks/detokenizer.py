"""The detokenizer: going on behind another worker, and chunks of several turns together, against their plain twins.

    python -m benchmarks.detokenizer take-over [--sizes smallest,tiny,150m] [--seconds 6,24] [--repeats 5]
    python -m benchmarks.detokenizer engine [--sizes smallest,tiny,150m] [--turns 1,8] [--points 30] [--repeats 5]

prints JSON. Weights are random; `150m` has a flow model of 151 million parameters and the vocoder
of `tiny`. Every repeat runs both ways one after the other; medians, and the ratio of each pair.

take_over   after so many seconds of speech: `restore` against synthesising the same pushes again, in ms, and the
            bytes of mel that must be fetched
engine      one chunk (41 tokens behind a full window of 900 mel frames) of each of so many turns, commit included, in
            ms of processor time: `FlowEngine`, at most 492 frames in one evaluation; one after the other by `solve`;
            and so with a modulation for every repeated frame, as the release has it, which is the plain twin. `parts`
            is where the engine's time goes, by operator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kimia.model.checkpoint import open_checkpoint
from kimia.model.checkpoint_presets import PRESETS as CHECKPOINTS
from kimia.model.chunking import Push, pushes
from kimia.model.detokenize import UPSAMPLE, Detokenizer
from kimia.model.dit import Chunk, DiT, Prefix
from kimia.model.flow import TimeGrid, commit, solve, time_grid
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
KEPT = LOW_LATENCY.commits[-1]  # tokens of a steady chunk
TOKENS = KEPT + LOW_LATENCY.look_ahead
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


def engine(dit: DiT, turns: int, grid: TimeGrid, repeats: int) -> dict[str, Any]:
    """The three ways, interleaved."""
    config = dit.config
    torch.manual_seed(1)
    shape = (config.depth, 1, config.heads, LOW_LATENCY.kv_window, config.head_dim)
    prefixes = [Prefix(torch.randn(shape), torch.randn(shape)) for _ in range(turns)]
    noises = [torch.randn(1, TOKENS * UPSAMPLE, config.mel_bins) for _ in range(turns)]
    ids = torch.arange(TOKENS)[None]

    def chunks(repeat: int) -> list[Chunk]:
        spread = ids.repeat_interleave(UPSAMPLE // repeat, 1)
        return [dit.chunk(spread, repeat, LOW_LATENCY.kv_window, prefix) for prefix in prefixes]

    def one_by_one(repeat: int) -> list[Tensor]:
        found, kept = [], KEPT * UPSAMPLE
        for chunk, noise in zip(chunks(repeat), noises, strict=True):
            found.append(solve(dit, noise, chunk, grid)[:, :kept])
            commit(dit, found[-1], chunk.head(kept // repeat))
        return found

    def together() -> list[Tensor]:
        flow, solvings = FlowEngine(dit), []
        for chunk, noise in zip(chunks(UPSAMPLE), noises, strict=True):
            solvings.append(Solving(chunk, noise, grid, KEPT, commits=True))
        while left := [solving for solving in solvings if not solving.done]:
            flow.advance(left[: max(1, FRAMES_AT_ONCE // (TOKENS * UPSAMPLE))])
        return [solving.x for solving in solvings]

    ways = {"engine": together, "one_by_one": lambda: one_by_one(UPSAMPLE), "plain_twin": lambda: one_by_one(1)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        mels = {name: torch.cat(way()) for name, way in ways.items()}
        for _ in range(repeats):
            for name, way in ways.items():
                times[name].append(processor_milliseconds(way))
        parts = _parts(together)
    return {
        **{f"{name}_ms": round(statistics.median(spent), 1) for name, spent in times.items()},
        "plain_twin_over_engine": round(_ratio(times["plain_twin"], times["engine"]), 2),
        "one_by_one_over_engine": round(_ratio(times["one_by_one"], times["engine"]), 2),
        "largest_difference_of_mels": float((mels["engine"] - mels["plain_twin"]).abs().max()),
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
            found[size] |= {n: engine(detokenizer.dit, int(n), grid, args.repeats) for n in args.turns.split(",")}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
