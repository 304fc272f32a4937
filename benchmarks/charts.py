"""One picture of the pipeline's numbers: added times over callers, the waterfall of one turn, scaling, features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = {"p50": "o-", "p99": "s--", "p99.9": "^:"}
AIMS = {"p50": 5.0, "p99": 15.0}  # ms of added first audio at sixteen turns at once
IDEAL = (1, 2, 4)
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write what the report holds as SVG or PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    machine = report["machine"]
    figure.suptitle(f"Pipeline without a model: {machine['cores']} cores, {machine['date']}", x=0.01, ha="left")
    if "transport" in report:
        _added(panels[0][0], report["transport"])
        _waterfall(panels[0][1], report["transport"])
    if "scaling" in report:
        _scaling(panels[1][0], report["scaling"])
    if "features" in report:
        _features(panels[1][1], report["features"])
    figure.savefig(path)


def _added(axes: Axes, report: Mapping[str, Any]) -> None:
    for (mode, part), colour in zip(report.items(), COLOURS, strict=False):
        for name, style in QUANTILES.items():
            rows = part["undisturbed"].items()
            points = [(int(callers), row["added_ms"]["first_audio"][name]) for callers, row in rows]
            known = [point for point in points if point[1] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), style, color=colour, label=f"{mode}, {name}")
    for name, aim in AIMS.items():
        axes.plot(16, aim, "*", color="black", markersize=10, label=f"aim: {name} {aim:g} ms")
    axes.set(xscale="log", yscale="log", xlabel="turns at once", ylabel="ms", title="added to the first audio")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _waterfall(axes: Axes, report: Mapping[str, Any]) -> None:
    """The moments of one turn alone."""
    alone = {mode: part["undisturbed"].get("1", {}) for mode, part in report.items()}
    mode = next((mode for mode in sorted(alone, reverse=True) if "waterfall_ms" in alone[mode]), None)  # zero first
    if mode is None:
        axes.set_axis_off()
        return
    marks = alone[mode]["waterfall_ms"]
    names, times = list(marks), list(marks.values())
    starts = [0.0, *times[:-1]]
    widths = [time - start for time, start in zip(times, starts, strict=True)]
    axes.barh(range(len(names)), widths, left=starts, color=["tab:red" if "client" in n else "tab:blue" for n in names])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ms from the request", title=f"one turn alone, stages: {mode} (medians)")
    axes.grid(axis="x", alpha=0.3)


def _scaling(axes: Axes, report: Mapping[str, Any]) -> None:
    axes.plot(IDEAL, IDEAL, color="gray", linewidth=1, label="ideal")
    for stage, part in report.items():
        points = [(int(count), row["ratio"]) for count, row in part["replicas"].items()]
        axes.plot(*zip(*points, strict=True), "o-", label=stage)
    axes.set(xlabel="replicas", ylabel="turns per minute, relative to one replica", title="scaling of one stage")
    axes.set_xticks(IDEAL)
    axes.legend()
    axes.grid(alpha=0.3)


def _features(axes: Axes, report: Mapping[str, Any]) -> None:
    lengths = report["blob_server"]["lengths"]
    ways = list(next(iter(lengths.values())))
    width = 0.8 / len(ways)
    for at, (way, colour) in enumerate(zip(ways, COLOURS, strict=True)):
        heights = [ways_of[way]["p50_ms"] for ways_of in lengths.values()]
        axes.bar([x + at * width for x in range(len(lengths))], heights, width, color=colour, label=way)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(lengths))], list(lengths))
    axes.set(yscale="log", xlabel="sound", ylabel="ms, p50", title="features: blobs in Redis or gRPC")
    axes.legend(fontsize=7)
    axes.grid(axis="y", alpha=0.3)
