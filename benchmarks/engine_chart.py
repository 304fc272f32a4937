"""One picture of the engine's numbers: tokens over rows, a step behind a long past, memory over many steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write what `benchmarks.engine` reports as SVG or PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    rows, context, memory = figure.subplots(1, 3)
    figure.suptitle(
        f"Engine, {report['parameters'] / 1e6:.0f} M parameters, {report['threads']} thread", x=0.01, ha="left"
    )
    _rows(rows, report["decode"])
    _context(context, report["context"])
    _memory(memory, report["memory"])
    figure.savefig(path)


def _rows(axes: Axes, decode: Mapping[str, Mapping[str, float]]) -> None:
    numbers = [int(number) for number in decode]
    axes.plot(numbers, [found["tokens_per_second_ratio"] for found in decode.values()], "o-", label="engine")
    axes.plot(numbers, numbers, ":", color="grey", label="rows for nothing")
    axes.set(title="Tokens per second against the plain loop", xlabel="rows", ylabel="times")
    axes.legend()


def _context(axes: Axes, context: Mapping[str, Mapping[str, float]]) -> None:
    names = [f"{rows} rows" for rows in context]
    axes.bar(names, [found["ms_more"] for found in context.values()], width=0.4, label="more behind a long past")
    axes.plot(names, [found["ms_of_the_bytes"] for found in context.values()], "k_", markersize=40, label="its bytes")
    axes.set(title="A step behind 6,000 instead of 500 positions", ylabel="ms")
    axes.legend()


def _memory(axes: Axes, memory: Mapping[str, list[float]]) -> None:
    axes.plot(memory["steps"], memory["resident_megabytes"], "o-", label="process")
    axes.plot(memory["steps"], memory["tensor_megabytes"], "s--", label="tensors")
    axes.set(title="Memory", xlabel="steps", ylabel="MB", ylim=(0, None))
    axes.legend()
