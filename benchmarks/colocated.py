"""Calls through a co-located host beside calls through a process for each stage: the same callers, one after the other.

    python -m benchmarks.colocated --model DIR --callers 1 4 --minutes 0.5 [--pairs 2] [--out FILE]

For each number of callers both services are started in turn, `pairs` times, and what callers waited for is compared:
figures of both, and the median of the pairs' ratios (host / processes), since only those mean anything on a machine
that others use. `benchmarks.calls` says what a caller does and what the figures are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import calls
from benchmarks.pipeline import say

FIGURES = {  # of a report of `benchmarks.calls`
    "voice-to-voice p50, ms": ("voice_to_voice_ms", "p50"),
    "first audio p50, ms": ("first_audio_ms", "p50"),
    "first audio worst, ms": ("first_audio_ms", "worst"),
    "gap p99, ms": ("gap_ms", "p99"),
}
STAGES = ("tokenizer", "llm", "detokenizer", "colocated")


def figures(report: Mapping[str, Any]) -> dict[str, float | None]:
    """What of a run is compared; None where nothing was measured."""
    found: dict[str, float | None] = {name: report[group][key] for name, (group, key) in FIGURES.items()}
    stages = [row for name, row in report["processes"].items() if name in STAGES]
    speech = report["speech_seconds"]
    found["underrun, % of speech"] = 100 * report["underrun_seconds"]["total"] / speech if speech else None
    found["stages: cores"] = sum(row["cores"] for row in stages)
    found["stages: memory, MiB"] = sum(row["rss_mib"]["greatest"] or 0.0 for row in stages)
    return found


def ratios(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Median over pairs of host / processes; None where a pair lacks the figure, or it is 0."""
    found: dict[str, float | None] = {}
    for name in pairs[0]["host"]:
        of_pairs = [
            host / apart
            for pair in pairs
            if (host := pair["host"][name]) is not None and (apart := pair["processes"][name])
        ]
        found[name] = statistics.median(of_pairs) if len(of_pairs) == len(pairs) else None
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of callers."""
    found: dict[str, Any] = {"setting": {name: str(value) for name, value in vars(args).items()}, "callers": {}}
    for callers in args.callers:
        pairs = []
        for _ in range(args.pairs):
            pair: dict[str, Any] = {"answers": {}, "failed": {}}
            for name, more in (("processes", []), ("host", ["--colocated"])):
                say(f"{callers} callers, {name}")
                words = ["run", "--callers", str(callers), "--capacity", str(args.capacity), "--model", str(args.model)]
                report = calls.measure(calls.parse([*words, "--minutes", str(args.minutes), *more]))
                found["machine"] = report["machine"]
                pair[name] = figures(report)
                pair["answers"][name], pair["failed"][name] = report["answers"], report["calls"]["failed"]
            pairs.append(pair)
        found["callers"][str(callers)] = {"pairs": pairs, "ratios": ratios(pairs)}
    return found


def show(found: Mapping[str, Any]) -> None:
    """The tables."""
    for callers, result in found["callers"].items():
        first = result["pairs"][0]
        print(f"\n{callers} callers{'':21}{'processes':>12}{'host':>12}{'ratio':>9}")
        print(f"{'answers':30}{first['answers']['processes']:12}{first['answers']['host']:12}")
        for name, ratio in result["ratios"].items():
            print(f"{name:30}{_cell(first['processes'][name])}{_cell(first['host'][name])}{_ratio(ratio)}")


def _cell(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:12.1f}"


def _ratio(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.2f}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description="One process for all stages against a process for each.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--capacity", type=int, default=4, help="rows of each stage (4)")
    parser.add_argument("--minutes", type=float, default=0.5, help="of each run (0.5)")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each (1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON")
    args = parser.parse_args(words)
    found = measure(args)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
