"""What the pipeline adds to the time of its stages, how it scales, and what goes over Redis. No model is computed.

    python -m benchmarks.pipeline transport [--callers 1 16 64 200] [--turns 1000] [--seconds 120]
    python -m benchmarks.pipeline traffic
    python -m benchmarks.pipeline scaling
    python -m benchmarks.pipeline features
    python -m benchmarks.pipeline all --out pipeline.json --plot pipeline.svg

print tables. All processes run on this machine: an embedded Valkey (AOF, fsync every second), three fake stages, an
orchestrator, and this process with the SDK as all of the callers.

transport  spoken questions in, spoken answers of 40 steps out, each caller one turn after another. What is added is the
           caller's time less the time of the same turn in one process without any transport. `zero`: stages that
           compute nothing, so that each caller keeps the service busy without pause: its capacity, and time in queues
           that grows with the callers. `gpu`: stages with the timing of one busy GPU (20 ms a step), as in service.
traffic    messages and bytes that Redis receives and sends, per second of speech.
scaling    turns per minute with 1, 2 and 4 replicas of the stage that is the bottleneck; stages only wait.
features   the language model's input features by blob or by gRPC.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks import features as feature_ways
from benchmarks.fleet import GPU, ZERO, Fleet, Plan, Timing, run, running, valkey
from benchmarks.load import MOMENTS, Load, Results, drive, floor
from benchmarks.stalls import watched
from benchmarks.wire import counts, log_sizes, rewriting, traffic, waterfall

MODES: Mapping[str, Timing] = {"zero": ZERO, "gpu": GPU}
REPLICAS = (1, 2, 4)
SCALED_ROWS = 2  # of one replica of the stage that is scaled
# The stage that is scaled takes most of a turn, the others as good as nothing.
SCALED: Mapping[str, Timing] = {
    "detokenizer": Timing(step_seconds=0.01, realtime_factor=1.0),
    "llm": Timing(prefill_seconds=0.2, step_seconds=0.08),
}

# ---- transport --------------------------------------------------------------------------------------------------


def transport(args: argparse.Namespace) -> dict[str, Any]:
    """Added times for every mode and number of callers, undisturbed and during AOF rewrites."""
    found: dict[str, Any] = {}
    for mode in args.modes:
        timing = MODES[mode]
        least = run(floor(timing))
        report: dict[str, Any] = {"floor_ms": least, "undisturbed": {}, "during_aof_rewrites": {}}
        for disturbed, levels in ((False, args.callers), (True, args.rewrite_callers)):
            part = report["during_aof_rewrites" if disturbed else "undisturbed"]
            for callers in levels:
                say(f"transport, {mode}, {callers} callers{', AOF rewrites' if disturbed else ''}")
                load = Load(callers, max(args.turns, 2 * callers), args.seconds)
                part[str(callers)] = one_load(timing, load, least, rewrites=disturbed)
        found[mode] = report
    return found


def one_load(timing: Timing, load: Load, least: Mapping[str, float], *, rewrites: bool) -> dict[str, Any]:
    """One load on a fresh service."""
    with running(Plan(timing)) as fleet:
        return run(_one_load(fleet, load, least, rewrites=rewrites))


async def _one_load(fleet: Fleet, load: Load, least: Mapping[str, float], *, rewrites: bool) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        seen = await stack.enter_async_context(rewriting(fleet.redis_url)) if rewrites else {}
        before, busy = fleet.cpu_seconds(), os.getloadavg()[0]
        with watched() as stalls:
            results = await drive(fleet.address, load)
        after = fleet.cpu_seconds()
        report = results.summary(least)
        turns = results.turns + load.callers  # with those of the warm-up
        report["cpu_ms_per_turn"] = {name: 1e3 * (after[name] - before[name]) / turns for name in after}
        report |= {"stalls": dict(stalls), "load_average_before": busy}
        if seen:
            report["rewriting"] = dict(seen)
        if load.callers == 1:
            report["waterfall_ms"] = await waterfall(fleet.redis_url, _latest(results))
    return report


def _latest(results: Results, count: int = 15) -> Results:
    """The last turns: the service forgets a turn without a session after half a minute."""
    times = {name: values[-count:] for name, values in results.times.items()}
    return Results(times=times, turn_ids=results.turn_ids[-count:], begun=results.begun[-count:])


# ---- traffic ----------------------------------------------------------------------------------------------------


def messages(args: argparse.Namespace) -> dict[str, Any]:
    """Messages and bytes per second of speech, sixteen turns at once."""
    say("traffic")
    with running(Plan(GPU)) as fleet:
        return run(_messages(fleet, Load(16, min(args.turns, 160), args.seconds)))


async def _messages(fleet: Fleet, load: Load) -> dict[str, Any]:
    await drive(fleet.address, Load(load.callers, 0, load.seconds))  # connections, scripts
    before = await counts(fleet.redis_url)
    results = await drive(fleet.address, load)
    after = await counts(fleet.redis_url)
    mean = results.speech_seconds / results.turns
    moved = traffic(before, after, results.speech_seconds + load.callers * mean)  # with those of its warm-up
    sizes = await log_sizes(fleet.redis_url, results.turn_ids, mean)
    return {"turns": results.turns, "speech_seconds_of_a_turn": mean, "redis": moved, **sizes}


# ---- scaling ----------------------------------------------------------------------------------------------------


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Turns per minute over replicas of one stage."""
    found: dict[str, Any] = {}
    for stage, timing in SCALED.items():
        runs = {str(count): _scaled(stage, timing, count, args) for count in REPLICAS}
        one = runs[str(REPLICAS[0])]["turns_per_minute"]
        found[stage] = {"timing": vars(timing), "replicas": runs}
        for report in runs.values():
            report["ratio"] = report["turns_per_minute"] / one
    return found


def _scaled(stage: str, timing: Timing, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """As many callers as the service admits."""
    say(f"scaling, {stage} x {count}")
    load = Load(SCALED_ROWS * count, args.scaling_turns * count, args.seconds)
    plan = Plan(timing, {stage: count}, {stage: SCALED_ROWS})
    with running(plan) as fleet, watched() as stalls:
        results: Results = run(drive(fleet.address, load))
    return {
        "turns": results.turns,
        "turns_per_minute": 60 * results.turns / results.seconds,
        "turns_of_each_worker": dict(results.workers[stage]),
        "stalls": dict(stalls),
    }


# ---- features ---------------------------------------------------------------------------------------------------


def features(args: argparse.Namespace) -> dict[str, Any]:
    """Blobs in a store without persistence, as production has them, and in the journal's; and gRPC."""
    say("features")
    found: dict[str, Any] = {}
    for name, append_only in (("blob_server", False), ("journal", True)):
        with valkey(append_only=append_only) as (url, _), watched() as stalls:
            found[name] = run(feature_ways.compare(url, args.repeats))
        found[name]["stalls"] = dict(stalls)
    return found


# ---- tables -----------------------------------------------------------------------------------------------------


def show_transport(report: Mapping[str, Any]) -> None:
    for mode, part in report.items():
        least = ", ".join(f"{name} {part['floor_ms'][name]:.1f}" for name in MOMENTS)
        print(f"\nadded by transport, {mode} (ms above the stages' own time: {least})")
        print(
            f"{'callers':>22}  {'turns':>6} {'per s':>6}  " + "  ".join(f"{name:^26}" for name in MOMENTS) + "  stall"
        )
        print(" " * 38 + "".join(f"  {'p50':>8} {'p99':>8} {'p99.9':>8}" for _ in MOMENTS) + "  worst")
        for state in ("undisturbed", "during_aof_rewrites"):
            for callers, row in part[state].items():
                label = callers if state == "undisturbed" else f"{callers}, AOF rewrites"
                times = "".join("  " + " ".join(_cell(v) for v in row["added_ms"][name].values()) for name in MOMENTS)
                stall = row["stalls"]["worst_ms"]
                print(f"{label:>22}  {row['turns']:6} {row['turns_per_second']:6.1f}{times}  {stall:5.0f}")
        _show_waterfall(part["undisturbed"].get("1", {}))
        _show_cpu(part["undisturbed"])


def _cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.1f}"


def _show_waterfall(row: Mapping[str, Any]) -> None:
    if "waterfall_ms" in row:
        print("\none caller, ms from the request (medians)")
        for name, value in row["waterfall_ms"].items():
            print(f"  {value:8.2f}  {name}")


def _show_cpu(rows: Mapping[str, Any]) -> None:
    print("\nprocessor time of a turn, ms")
    for callers, row in rows.items():
        parts = ", ".join(f"{name} {value:.1f}" for name, value in row["cpu_ms_per_turn"].items())
        print(f"  {callers:>4} callers: {sum(row['cpu_ms_per_turn'].values()):.1f} = {parts}")


def show_traffic(report: Mapping[str, Any]) -> None:
    moved = report["redis"]
    print("\nRedis per second of speech")
    for name, log in report["logs"].items():
        print(f"  log {name:8} {log['messages']:6.1f} messages  {log['bytes']:9.0f} bytes")
    print(
        f"  pointers     {moved['pointers']:6.1f} messages"
        f"  {moved['pointers'] * report['bytes_of_a_pointer']:9.0f} bytes"
    )
    print(f"  on the wire  {moved['bytes_received']:.0f} bytes received, {moved['bytes_sent']:.0f} sent")
    print("  calls        " + ", ".join(f"{name} {count:.1f}" for name, count in moved["calls"].items()))


def show_scaling(report: Mapping[str, Any]) -> None:
    print("\nturns per minute over replicas")
    for stage, part in report.items():
        for count, row in part["replicas"].items():
            served = ", ".join(str(turns) for turns in row["turns_of_each_worker"].values())
            line = f"{row['turns_per_minute']:7.1f}  x {row['ratio']:.2f}  turns of each worker: {served}"
            print(f"  {stage:12} x {count} {line}")


def show_features(report: Mapping[str, Any]) -> None:
    print("\nfeatures, ms p50 / p99 (bytes through Redis)")
    for store, part in report.items():
        print(f"  {store}")
        for length, ways in part["lengths"].items():
            cells = (
                f"{n} {w['p50_ms']:.2f} / {w['p99_ms']:.2f} ({w['redis_bytes'] / 1e3:.0f} kB)" for n, w in ways.items()
            )
            print(f"    {length:5} " + "; ".join(cells))
        pings = (f"{n} {p['p50_ms']:.2f} / {p['p99_ms']:.2f}" for n, p in part["publishing_beside"].items())
        print("    a small command beside: " + "; ".join(pings))


# ---- command ----------------------------------------------------------------------------------------------------

PARTS: Mapping[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[Mapping[str, Any]], None]]] = {
    "transport": (transport, show_transport),
    "traffic": (messages, show_traffic),
    "scaling": (scaling, show_scaling),
    "features": (features, show_features),
}


def say(what: str) -> None:
    """Progress."""
    print(f"{datetime.datetime.now():%H:%M:%S} {what}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    now = datetime.datetime.now(datetime.UTC)
    return {"date": f"{now:%Y-%m-%d}", "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}


def _lines(path: str) -> Sequence[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else ()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The pipeline without a model: transport, traffic, scaling, features.")
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.svg or .png; needs matplotlib)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="(both)")
    parser.add_argument("--callers", nargs="+", type=int, default=[1, 16, 64, 200], metavar="N", help="(1 16 64 200)")
    parser.add_argument("--rewrite-callers", nargs="*", type=int, default=[1, 16, 64, 200], metavar="N", help="(same)")
    parser.add_argument("--turns", type=int, default=1000, help="of each load; for p99.9 at least 1000 (1000)")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a load ends all the same (120)")
    parser.add_argument("--scaling-turns", type=int, default=40, metavar="N", help="turns for each replica (40)")
    parser.add_argument("--repeats", type=int, default=300, help="of each fetch of features (300)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, write."""
    args = parse(words)
    names = list(PARTS) if args.part == "all" else [args.part]
    report: dict[str, Any] = {"machine": machine()}
    for name in names:
        measure, show = PARTS[name]
        report[name] = measure(args)
        show(report[name])
        if args.out:  # after every part: a long run that is stopped has not been in vain
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from benchmarks.charts import draw

        draw(report, args.plot)


if __name__ == "__main__":
    main()
