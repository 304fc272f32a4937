"""Ratios that a change must not lose: fast paths against their plain twins, many turns against one. For CI.

    python -m benchmarks.regress             # exit code 1 when a ratio is a fifth below benchmarks/regress.json
    python -m benchmarks.regress --write     # measure anew and write that file, on the machine that is to hold it

Both sides of a ratio run in turns in one thread of one process, in time that this thread computed; a ratio is the
median of its pairs. Neighbours that take cache and cores may still press one: what lies too low is measured again, up
to ATTEMPTS times, and its best counts, since a path that has become slower is slower each time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.engine import Bench, prompt_of, timed
from kimia.model.checkpoint import open_checkpoint
from kimia.model.chunking import Push
from kimia.model.detokenize import UPSAMPLE, Detokenizer
from kimia.model.dit import DiT, Prefix
from kimia.model.flow import commit, solve, time_grid
from kimia.model.flow_engine import FlowEngine, Solving
from kimia.model.lm import load_lm
from kimia.model.presets import LOW_LATENCY
from kimia.model.random_weights import new_checkpoint

BASELINE = Path(__file__).with_suffix(".json")
LOST = 0.8  # of the baseline: below, a ratio is lost
ATTEMPTS = 4
POINTS = 4  # of the time grid: three steps and the commit

Pair = tuple[Callable[[], object], Callable[[], object], float]  # plain, fast, work of fast / work of plain


def ratio(pair: Pair, pairs: int) -> float:
    """How many times the work the fast side does in the same time."""
    plain, fast, work = pair
    return statistics.median(work * timed(plain) / timed(fast) for _ in range(pairs))


def decode(bench: Bench, rows: int) -> Pair:
    """A step of the plain loop, one of the engine."""
    prompt = prompt_of(100)
    return bench.plain(prompt), bench.engine(rows, prompt)[0], rows


class Chunks:
    """Steady chunks behind a full window, noise in and mel out."""

    def __init__(self, dit: DiT, points: int = POINTS) -> None:
        config, self.dit = dit.config, dit
        self.push = Push((0,) * (LOW_LATENCY.commits[-1] + LOW_LATENCY.look_ahead), final=False)
        torch.manual_seed(1)
        window = torch.randn(config.depth, 1, config.heads, LOW_LATENCY.kv_window, config.head_dim)
        window = window.to(dit.device, dit.dtype)
        self.prefix = Prefix(window, window.flip(0))
        self.noise = torch.randn(1, len(self.push.tokens) * UPSAMPLE, config.mel_bins).to(dit.device)
        self.grid = time_grid(points)
        self.kept = LOW_LATENCY.commits[-1] * UPSAMPLE

    def plain(self, repeat: int) -> None:
        """One chunk by `solve`; `repeat` mel frames share a modulation: 1 is the plain twin."""
        ids = torch.tensor([self.push.tokens]).repeat_interleave(UPSAMPLE // repeat, 1)
        chunk = self.dit.chunk(ids, repeat, LOW_LATENCY.kv_window, self.prefix)
        mel = solve(self.dit, self.noise, chunk, self.grid)[:, : self.kept]
        commit(self.dit, mel, chunk.head(self.kept // repeat))

    def engine(self, count: int) -> None:
        """So many chunks by the engine, all in one evaluation."""
        flow, ids = FlowEngine(self.dit), torch.tensor([self.push.tokens])
        solvings = [
            Solving(
                self.dit.chunk(ids, UPSAMPLE, LOW_LATENCY.kv_window, self.prefix),
                self.noise,
                self.grid,
                LOW_LATENCY.commits[-1],
                commits=True,
            )
            for _ in range(count)
        ]
        while left := [solving for solving in solvings if not solving.done]:
            flow.advance(left)


def measures(folder: Path) -> dict[str, tuple[Pair, int]]:
    """Every ratio by its name, with the pairs that it takes."""
    checkpoint = open_checkpoint(new_checkpoint(folder / "model", "tiny", progress=False))
    bench = Bench(load_lm(checkpoint.root, device="cpu", dtype=torch.float32), 0)
    chunks = Chunks(Detokenizer.load(checkpoint, "cpu", torch.float32).dit)
    return {
        "decode, 1 row: engine / plain loop": (decode(bench, 1), 60),
        "decode, 16 rows: engine / plain loop": (decode(bench, 16), 60),
        "flow chunk: engine / plain twin": ((lambda: chunks.plain(1), lambda: chunks.engine(1), 1), 9),
        "flow chunk: 3 together / plain twin": ((lambda: chunks.plain(1), lambda: chunks.engine(3), 3), 9),
    }


def held(name: str, pair: Pair, pairs: int, baseline: float) -> tuple[float, bool]:
    """The ratio, and whether it is held."""
    best = 0.0
    for attempt in range(ATTEMPTS):
        found = ratio(pair, pairs)
        best = max(best, found)
        if best >= LOST * baseline:
            return best, True
        print(f"  {name}: {found:.2f} at attempt {attempt + 1}", file=sys.stderr)
    return best, False


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {BASELINE.name} instead of comparing with it")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="ratios to hold, or to write")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        found = measures(Path(folder))
        if args.write:
            ratios = {name: round(statistics.median(ratio(*one) for _ in range(3)), 2) for name, one in found.items()}
            args.baseline.write_text(json.dumps(ratios, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(ratios, indent=1))
            return 0
        return compare(found, json.loads(args.baseline.read_text(encoding="utf-8")))


def compare(found: dict[str, tuple[Pair, int]], baseline: dict[str, float]) -> int:
    """A line for each ratio; 1 when one is lost, or the file names others than are measured."""
    if found.keys() != baseline.keys():
        print(f"the baseline holds {sorted(baseline)}, measured are {sorted(found)}; write it anew: --write")
        return 1
    lost = 0
    for name, (pair, pairs) in found.items():
        best, there = held(name, pair, pairs, baseline[name])
        lost += not there
        print(f"{'held' if there else 'LOST'}  {name}: {best:.2f}, baseline {baseline[name]:.2f}", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
