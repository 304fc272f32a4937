"""Calls as they are made: callers in real time, what they hear, and what the service uses meanwhile.

    python -m benchmarks.calls run --callers 8 --minutes 2
    python -m benchmarks.calls run --callers 8 --model DIR             # real stages, with `kimia up --model DIR`
    python -m benchmarks.calls run --callers 8 --server HOST:PORT      # any running service
    python -m benchmarks.calls soak --callers 32 --capacity 40 --minutes 30 --out soak.json --plot soak.svg
    python -m benchmarks.calls run --callers 16 --replicas 2 --minutes 10 --kills 100        # who dies, by --seed
    python -m benchmarks.calls soak --load 2.0 --capacity 40 --minutes 10       # twice the capacity

print tables. `run` reports what callers hear, `soak` also how memory grows and which keys are left in the store when
the sessions have been deleted or have expired. Without --model or --server the stages are fakes with the timing
of a GPU (20 ms a step, a tenth of a second of computing per second of speech), started by `kimia up --fake`.

voice-to-voice  the last frame of the question was sent -> the first piece of speech is there
first audio     from the start of the turn to its first speech, on the service's clock
gap             between two pieces of an answer; `reserve`: speech that was not yet played when the next piece came
underrun        seconds in which a player had nothing to play in the middle of an answer. Explained by the machine: a
                stall that a process beside has recorded fell between the piece before and the late one, and counts with
                its length; explained by the callers: the same with late ticks of the callers' own process
continuity      share of answers that were played without underrun
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.callers import Habits, Spec, calling
from benchmarks.fleet import GPU, STAGES
from benchmarks.hearing import hear
from benchmarks.kills import Death, draw, killing
from benchmarks.pipeline import machine, say
from benchmarks.service import Service, up
from benchmarks.stalls import LIMITS, watched
from benchmarks.watching import MIB, Watch, leftovers

SAMPLE_SECONDS = 2.0
TTL_SECONDS = 60.0  # of turns, blobs and sessions: so that what is left over shows within a run
EXPIRY_SECONDS = 400.0  # a turn's keys outlive its deadline (120 s), its session and themselves
LONGEST_CALL = 180.0  # seconds for the calls that run to end
FAKE = {**GPU.environment(), "KIMIA_FAKE_STEPS": "250"}  # callers ask for less


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run: callers, the service, the machine."""
    with ExitStack() as stack:
        service = stack.enter_context(_service(args))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kimia-calls-")))
        begun = time.monotonic()
        with watched() as stalls:
            watch, deaths = _run(args, service, folder)
        seconds = time.monotonic() - begun
        report = {
            "machine": {**machine(), "load_average": os.getloadavg()[0]},
            "setting": _setting(args),
            "seconds": seconds,
            **hear(_records(folder), stalls.pop("intervals"), begun, deaths),
            "stalls": dict(stalls),
            "processes": watch.report(),
            "store": watch.data(),
            "memory": _memory(watch, begun),
        }
        if args.part == "soak" and service.redis_url is not None:
            report["keys"] = _expired(service.redis_url)
    return report


def _expired(redis_url: str) -> dict[str, Any]:
    """What is left in the store when nothing is, or when all that expires should have."""
    say(f"waiting for what expires, at most {EXPIRY_SECONDS:.0f} s")
    begun = time.monotonic()
    while (found := leftovers(redis_url))["left"] and time.monotonic() < begun + EXPIRY_SECONDS:
        time.sleep(SAMPLE_SECONDS)
    return {**found, "after_seconds": time.monotonic() - begun}


@contextmanager
def _service(args: argparse.Namespace) -> Iterator[Service]:
    """The service named, or one of fakes or of a model that is started for this run."""
    if args.server:
        yield Service(args.server, args.redis)
        return
    seconds = {f"KIMIA_{name}_TTL_SECONDS": str(TTL_SECONDS) for name in ("TURN", "SESSION", "BLOB")}
    rows = -(-args.capacity // args.replicas)
    environment = {**seconds, "KIMIA_ROWS": str(rows), "KIMIA_LOG_LEVEL": "warning", **FAKE}
    kinds = ["colocated"] if args.colocated else STAGES
    replicas = [*(["--colocated"] if args.colocated else []), "--replicas"]
    replicas += [f"{kind}={args.replicas}" for kind in kinds]
    with up([*(["--model", args.model] if args.model else ["--fake"]), *replicas], environment) as service:
        yield service


def _run(args: argparse.Namespace, service: Service, folder: Path) -> tuple[Watch, list[Death]]:
    """Callers from the first to the last; what was sampled, and who was killed meanwhile."""
    count = callers_of(args)
    specs = [
        Spec(service.address, range(first, count, args.processes), 60 * args.minutes, args.seed)
        for first in range(args.processes)
    ]
    say(f"{count} callers in {args.processes} processes for {args.minutes:g} min")
    every = 60 * args.minutes / max(args.kills, 1)
    kills = draw(args.seed, args.kills, every)
    with calling(specs, folder) as callers, killing(kills, service.processes) as deaths:
        own = {f"callers.{number}": process.pid or 0 for number, process in enumerate(callers, 1)}
        watch = Watch(lambda: {**service.processes(), **own}, service.redis_url)
        deadline = time.monotonic() + 60 * args.minutes + LONGEST_CALL
        while any(process.is_alive() for process in callers):
            watch.sample()
            if time.monotonic() > deadline:
                raise RuntimeError(f"calls do not end {LONGEST_CALL:.0f} s after their time")
            time.sleep(SAMPLE_SECONDS)
        if failed := [process.exitcode for process in callers if process.exitcode]:
            raise RuntimeError(f"callers ended with exit codes {failed}")
    return watch, deaths


def _records(folder: Path) -> list[dict[str, Any]]:
    """What all callers have written down, with the process that wrote it."""
    return [
        {**json.loads(line), "process": file.stem}
        for file in sorted(folder.iterdir())
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


def _memory(watch: Watch, begun: float) -> dict[str, Any]:
    """Over time: [seconds, MiB] of each process, [seconds, MiB, keys] of the store."""
    series = {
        name: [[round(sample.at - begun, 1), round(sample.used.rss / MIB, 2)] for sample in samples]
        for name, samples in watch.samples.items()
    }
    return {"processes": series, "store": [[round(t - begun, 1), round(b / MIB, 2), n] for t, b, n in watch.store]}


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: value for name, value in vars(args).items() if name not in ("out", "plot") and value is not None}
    return {**chosen, "callers": callers_of(args), "habits": vars(Habits())}


def callers_of(args: argparse.Namespace) -> int:
    return int(args.callers or round(args.load * args.capacity))


# ---- tables -----------------------------------------------------------------------------------------------------


def show(report: Mapping[str, Any]) -> None:
    """The report for people."""
    calls, turns = report["calls"], report["turns"]
    print(
        f"\n{calls['admitted']} calls, {calls['refused_at_start']} refused at their start, "
        f"{calls['refused_later']} later, {calls['failed']} failed; turns: "
        + ", ".join(f"{count} {end}" for end, count in turns.items())
    )
    print(f"{'':24}{'n':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'worst':>9}")
    for name, row in {
        "voice-to-voice, ms": report["voice_to_voice_ms"],
        "first audio, ms": report["first_audio_ms"],
        "gap, ms": report["gap_ms"],
        "underruns, ms": report["underrun_ms"],
        "cancel: last stale, ms": report["barge_in"]["last_stale_ms"],
        "cancel: answered, ms": report["barge_in"]["acknowledged_ms"],
        "call set up, ms": calls["set_up_ms"],
        "told to wait, s": calls["told_to_wait_seconds"],
        "waited for a row, s": calls["waited_for_a_row_seconds"],
        "callers: late frame, ms": report["callers"]["worst_frame_of_a_question_ms"],
    }.items():
        print(f"{name:24}{row['n']:7}" + "".join(_cell(row[key]) for key in ("p50", "p95", "p99", "worst")))
    reserve = report["reserve_ms"]
    print(f"{'reserve, ms':24}{reserve['n']:7}" + " ".join(f"  {k}{_cell(reserve[k])}" for k in ("p1", "p5", "p50")))
    _show_silence(report)
    _show_deaths(report.get("deaths", {}))
    _show_processes(report)
    for reason, count in Counter(report["failures"]).most_common(5):
        print(f"failed {count} times: {reason}")


def _cell(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.1f}"


def _show_silence(report: Mapping[str, Any]) -> None:
    dry = report["underrun_seconds"]
    print(
        f"\nunderrun {dry['total']:.3f} s of {report['speech_seconds']:.0f} s of speech: machine "
        f"{dry['explained_by_machine']:.3f}, callers {dry['explained_by_callers']:.3f}, "
        f"unexplained {dry['unexplained']:.3f}"
    )
    print(
        f"continuity {_percent(report['continuity'])}, but for stalls {_percent(report['continuity_but_for_stalls'])}"
    )
    stalls, callers = report["stalls"], report["callers"]
    counts = ", ".join(f"{stalls[f'over_{limit}_ms']} over {limit} ms" for limit in LIMITS)
    print(f"stalls of the machine: {counts}, worst {stalls['worst_ms']:.0f} ms")
    print(f"late ticks of the callers: {callers['late_ticks']}, worst {callers['worst_tick_ms']:.0f} ms")


def _show_deaths(deaths: Mapping[str, Any]) -> None:
    for name, row in deaths.items():
        wait = row["wait_ms"]
        cells = "".join(f"  {key}{_cell(wait[key])}" for key in ("p50", "p95", "worst"))
        dry = f"underrun {row['underrun_seconds']:.3f} s, unexplained {row['unexplained_seconds']:.3f} s"
        print(f"killed, {name:15} {wait['n']:5} answers, ms to the next piece:{cells}; {dry}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _show_processes(report: Mapping[str, Any]) -> None:
    times, memory = ("cores", "waiting"), ("first", "last", "greatest")
    print(
        f"\n{'process':16}" + "".join(f"{name:>9}" for name in (*times, "lives", *memory)) + f" MiB{'slope':>9} MiB/h"
    )
    for name, row in report["processes"].items():
        shares = "".join(f"{row[key]:9.3f}" for key in times)
        rss = "".join(_cell(row["rss_mib"][key]) for key in memory)
        print(f"{name:16}{shares}{row['lives']:9}{rss}    {_cell(row['slope_mib_per_hour'])}")
    cores, callers = sum(row["cores"] for row in report["processes"].values()), report["setting"]["callers"]
    print(
        f"{'together':16}{cores:9.3f}, {1000 * cores / callers:.1f} thousandths of a core for each of {callers} callers"
    )
    data = report["store"]
    slopes = _cell(data["slope_mib_per_hour"]), _cell(data["slope_keys_per_hour"])
    print(f"the store's data: greatest{_cell(data['greatest_mib'])} MiB, slope{slopes[0]} MiB/h,{slopes[1]} keys/h")
    if "keys" in report:
        keys = report["keys"]
        print(f"\n{keys['left']} keys left that are not permanent, after {keys['after_seconds']:.0f} s")
        for kind, found in sorted(keys["kinds"].items()):
            life = f"{found['for_ever']} for ever, longest TTL {found['longest_ttl_seconds']} s"
            print(f"  {kind:10}{found['keys']:6}  {life}  {found['examples'][0]}")


# ---- command ----------------------------------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Callers in real time.")
    parser.add_argument("part", choices=("run", "soak"))
    parser.add_argument("--callers", type=int, metavar="N", help="(as --load says)")
    parser.add_argument("--load", type=float, default=0.8, help="callers for each session of the capacity (0.8)")
    parser.add_argument("--capacity", type=int, default=40, help="rows of each stage, all replicas together (40)")
    parser.add_argument("--replicas", type=int, default=1, help="processes of each stage (1)")
    parser.add_argument("--minutes", type=float, default=2.0, help="after which nobody calls again (2)")
    parser.add_argument("--kills", type=int, default=0, help="of processes, spread over parts and time by --seed (0)")
    parser.add_argument("--processes", type=int, default=1, help="of callers (1)")
    parser.add_argument("--seed", type=int, default=1, help="of all that callers do (1)")
    parser.add_argument("--model", metavar="DIR", help="real stages of this model instead of fakes")
    parser.add_argument("--colocated", action="store_true", help="with --model: all stages in one process")
    parser.add_argument("--server", metavar="HOST:PORT", help="call a service that runs")
    parser.add_argument("--redis", metavar="URL", help="its store, to be watched")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.svg or .png; needs matplotlib)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write, show, draw."""
    args = parse(words)
    report = measure(args)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    if args.plot:
        from benchmarks.calls_chart import draw as draw_chart

        draw_chart(report, args.plot)


if __name__ == "__main__":
    main()
