"""Pictures of a run of calls: waits, gaps, silences and stalls over time, memory over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a report of `benchmarks.calls` as SVG or PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 12), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 2)
    machine, setting = report["machine"], report["setting"]
    figure.suptitle(
        f"Calls: {setting['callers']} callers, capacity {setting['capacity']}, {report['seconds'] / 60:.1f} min; "
        f"{machine['cores']} cores, {machine['date']}",
        x=0.01,
        ha="left",
    )
    _waits(panels[0][0], report)
    _gaps(panels[0][1], report["gap_ms"])
    _waits_over_time(panels[1][0], report["timeline"])
    _silences(panels[1][1], report)
    _memory(panels[2][0], report["memory"]["processes"])
    _store(panels[2][1], report["memory"]["store"])
    figure.savefig(path)


def _waits(axes: Axes, report: Mapping[str, Any]) -> None:
    waits = [wait for _, wait in report["timeline"]["voice_to_voice"]]
    axes.hist(waits, bins=60, color="tab:blue")
    for name, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
        if (value := report["voice_to_voice_ms"][name]) is not None:
            axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name} {value:.0f} ms")
    axes.set(xlabel="ms", ylabel="answers", title="voice-to-voice")
    if waits:
        axes.legend(fontsize=7)


def _gaps(axes: Axes, gaps: Mapping[str, Any]) -> None:
    axes.stairs(gaps["counts"], gaps["edges"], fill=True, color="tab:orange")
    if gaps["p99"] is not None:
        axes.axvline(gaps["p99"], color="black", linestyle=":", linewidth=1, label=f"p99 {gaps['p99']:.0f} ms")
        axes.legend(fontsize=7)
    axes.set(xscale="log", xlabel="ms", ylabel="pieces", title="gap between two pieces of an answer")


def _waits_over_time(axes: Axes, timeline: Mapping[str, Any]) -> None:
    if waits := timeline["voice_to_voice"]:
        axes.plot(*np.array(waits).T, ".", markersize=3)
    axes.set(xlabel="s", ylabel="ms", title="voice-to-voice over time", ylim=(0, None))
    axes.grid(alpha=0.3)


def _silences(axes: Axes, report: Mapping[str, Any]) -> None:
    """Everything that stood still, by its length."""
    timeline = report["timeline"]
    dry = [(found["at"], found["seconds"]) for found in report["underruns"]]
    kinds = {
        "stalls of the machine": (timeline["stalls"], "|", "gray"),
        "late ticks of the callers": (timeline["late"], "x", "tab:orange"),
        "underruns": (dry, "o", "tab:red"),
    }
    for label, (points, marker, colour) in kinds.items():
        if points:
            at, seconds = np.array(points).T
            axes.plot(at, 1e3 * seconds, marker, color=colour, markersize=4, label=label)
            axes.set(yscale="log")
    for number, (at, _) in enumerate(timeline["deaths"]):
        axes.axvline(at, color="tab:purple", linewidth=0.7, label="" if number else "kills")
    if axes.lines:
        axes.legend(fontsize=7, loc="upper right")
    axes.set(xlabel="s", ylabel="ms", title="underruns and stalls over time", xlim=(0, report["seconds"]))
    axes.grid(alpha=0.3)


def _memory(axes: Axes, processes: Mapping[str, Any]) -> None:
    for name, series in processes.items():
        axes.plot(*np.array(series).T, linewidth=1, label=name)
    axes.set(xlabel="s", ylabel="MiB", title="resident memory", ylim=(0, None))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _store(axes: Axes, series: Any) -> None:
    if not series:
        axes.set_axis_off()
        return
    at, mebibytes, keys = np.array(series).T
    axes.plot(at, mebibytes, linewidth=1, color="tab:blue", label="MiB")
    axes.set(xlabel="s", ylabel="MiB", title="the store: data and keys", ylim=(0, None))
    other = axes.twinx()
    other.plot(at, keys, linewidth=1, color="tab:green", label="keys")
    other.set(ylabel="keys", ylim=(0, None))
    axes.legend([*axes.lines, *other.lines], ["MiB", "keys"], fontsize=7, loc="lower right")
