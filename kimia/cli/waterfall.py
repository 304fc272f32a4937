"""Where the time of a turn went: its phases on one time axis, as text or as a picture.

    request      accepted     0    12  ██
    tokenizer    queue       12     1    ·
                 encode      13    40    █████
    llm          queue       53     1         ·
                 prefill     54    60         ▒▒▒▒▒▒▒
                 decode     114   500                ███████████████████████
    ...

The axis is the caller's clock and begins with the request. The service's times, taken on the journal's clock, are
placed on it as late as the caller's own marks allow: nothing arrives before it happened. What then is left at the end
was the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kimia.client.events import ClientTimes, Latency, StageLatency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = {"wait": "·", "first": "▒", "work": "█", "way": "░"}
PLAIN_BARS = {"wait": ".", "first": "-", "work": "#", "way": "="}
COLOURS = {"wait": "#c9c9c9", "first": "#e0a458", "work": "#1f4e79", "way": "#8a8a8a"}
MEANINGS = {"wait": "waiting for a worker", "first": "to the first result", "work": "then", "way": "on the way"}
FIRST = {"tokenizer": "encode", "llm": "prefill", "detokenizer": "first chunk"}
REST = {"tokenizer": "encode", "llm": "decode", "detokenizer": "synthesis"}
SLACK = 0.0005  # seconds: what is shorter is not drawn as a phase of its own


@dataclass(frozen=True)
class Phase:
    """A stretch of time, seconds from the request."""

    stage: str
    name: str
    kind: str  # of BARS
    begin: float
    end: float
    note: str = ""


@dataclass(frozen=True)
class Waterfall:
    """A turn on one axis."""

    phases: tuple[Phase, ...]
    marks: tuple[tuple[str, float], ...]  # what the caller got, and when
    total: float  # seconds, length of the axis


def waterfall(latency: Latency, times: ClientTimes) -> Waterfall:
    """The phases of a turn, from what the service and the client have measured."""
    begun = _offset(latency, times)
    ended = begun + (latency.total or 0.0)
    total = max(times.total or 0.0, ended)
    phases = [Phase("request", "accepted", "way", 0.0, begun)]
    for stage in latency.stages:
        phases += _stage_phases(stage, begun)
    if total - ended > SLACK:
        phases.append(Phase("reply", "arrived", "way", ended, total))
    heard = (("first text", times.first_text), ("first audio", times.first_audio), ("end", times.total))
    return Waterfall(tuple(phases), tuple((name, time) for name, time in heard if time is not None), total)


def _offset(latency: Latency, times: ClientTimes) -> float:
    """When the turn began, on the caller's clock: the least time by which something arrived after it happened."""
    pairs = (
        (0.0, times.started),
        (latency.first_text, times.first_text),
        (latency.first_audio, times.first_audio),
        (latency.total, times.total),
    )
    late = [arrived - happened for happened, arrived in pairs if happened is not None and arrived is not None]
    return max(min(late, default=0.0), 0.0)


def _stage_phases(stage: StageLatency, begun: float) -> list[Phase]:
    """Queue, time to the first result, and the rest."""
    note = "" if stage.compute is None else f"{stage.compute * 1000:.0f} ms computing"
    if stage.take_overs:
        note += f", taken over {stage.take_overs} times" if stage.take_overs > 1 else ", taken over once"
    steps = [
        ("queue", "wait", stage.queued, stage.claimed),
        (FIRST.get(stage.stage, "first"), "first", stage.claimed, stage.first),
        (REST.get(stage.stage, "rest"), "work", stage.first, stage.done),
    ]
    if stage.stage == "tokenizer":  # its first result is of no use to anybody before the last
        steps[1:] = [(REST[stage.stage], "work", stage.claimed, stage.done)]
    found = [
        Phase(stage.stage, name, kind, begun + begin, begun + end)
        for name, kind, begin, end in steps
        if begin is not None and end is not None and (end - begin > SLACK or kind == "wait")
    ]
    if found and note:
        last = found[-1]
        found[-1] = Phase(last.stage, last.name, last.kind, last.begin, last.end, note)
    return found


# ---- as text ----------------------------------------------------------------------------------------------------


def as_text(fall: Waterfall, width: int = 100, plain: bool = False) -> str:
    """The phases as lines of at most about `width` characters; `plain` uses ASCII only."""
    bars = PLAIN_BARS if plain else BARS
    columns = max(width - 44, 20)
    scale = columns / fall.total if fall.total > 0 else 0.0
    lines = [f"{'stage':<12} {'phase':<12}{'from':>7}{'ms':>7}  0{_ms(fall.total) + ' ms':>{columns - 1}}"]
    before = ""
    for phase in fall.phases:
        left, right = round(phase.begin * scale), round(phase.end * scale)
        bar = " " * min(left, columns - 1) + bars[phase.kind] * max(right - left, 1)
        stage = "" if phase.stage == before else phase.stage
        before = phase.stage
        times = f"{_ms(phase.begin):>7}{_ms(phase.end - phase.begin):>7}"
        lines.append(f"{stage:<12} {phase.name:<12}{times}  {bar}".rstrip())
    lines += _notes(fall)
    return "\n".join(lines)


def _notes(fall: Waterfall) -> list[str]:
    heard = ", ".join(f"{name} {_ms(time)}" for name, time in fall.marks)
    computing = "; ".join(f"{phase.stage} {phase.note}" for phase in fall.phases if phase.note)
    return [line for line in (f"the caller got: {heard}" if heard else "", computing) if line]


def _ms(seconds: float) -> str:
    """Milliseconds, with one digit below ten."""
    milliseconds = seconds * 1000
    return f"{milliseconds:.1f}" if milliseconds < 9.95 else f"{milliseconds:.0f}"


# ---- as a picture -----------------------------------------------------------------------------------------------


def draw_waterfall(fall: Waterfall, title: str, path: Path) -> None:
    """Write the phases as SVG or PNG. Raises ParameterError when that is not possible."""
    from kimia.cli.draw import check_format
    from kimia.errors import ParameterError

    check_format(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.32 * len(fall.phases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _bars(axes, fall)
    _marks(axes, fall)
    axes.set_xlim(0, fall.total * 1000 or 1)
    axes.set_xlabel("milliseconds since the request")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be written ({error.strerror})") from error


def _bars(axes: Axes, fall: Waterfall) -> None:
    shown: set[str] = set()
    for place, phase in enumerate(fall.phases):
        length = (phase.end - phase.begin) * 1000
        label = None if phase.kind in shown else MEANINGS[phase.kind]
        shown.add(phase.kind)
        axes.barh(place, length, left=phase.begin * 1000, color=COLOURS[phase.kind], height=0.7, label=label)
        axes.text(phase.end * 1000, place, f" {_ms(phase.end - phase.begin)}", va="center", fontsize=8)
    axes.set_yticks(range(len(fall.phases)), [f"{phase.stage}: {phase.name}" for phase in fall.phases])
    axes.invert_yaxis()
    axes.legend(loc="upper right", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _marks(axes: Axes, fall: Waterfall) -> None:
    for name, time in fall.marks[:-1]:
        axes.axvline(time * 1000, color="#a33b20", linewidth=1)
        text = f" {name} {_ms(time)}"
        axes.text(time * 1000, len(fall.phases) - 0.45, text, color="#a33b20", fontsize=8, va="bottom")
