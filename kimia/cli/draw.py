"""One picture of an answer: waveform, mel spectrogram and the two token tracks on a common time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kimia.errors import ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class AnswerPicture:
    """What is drawn of one spoken answer."""

    title: str
    pcm: npt.NDArray[np.float32]  # (N,)
    sample_rate: int  # Hz
    mel: npt.NDArray[np.float32]  # (mel frames, mel bins), natural log
    codes: Sequence[int]  # one per audio frame
    text: Sequence[tuple[int, str]]  # (step, piece of text)
    delay: int  # steps by which text leads audio
    frame_rate: float  # semantic tokens per second


def check_format(path: Path) -> None:
    """Raise ParameterError unless the name ends with a format that is drawn here and the library is installed."""
    if path.suffix.lower() not in FORMATS:
        raise ParameterError(f"{path}: pictures are written as {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ParameterError("drawing needs matplotlib: pip install 'kimia[plot]'") from error


def draw_answer(picture: AnswerPicture, path: Path) -> None:
    """Write the picture as SVG or PNG. Raises ParameterError when that is not possible."""
    check_format(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [1.2, 2, 1.4, 1]})
    figure.suptitle(picture.title, fontsize=11, x=0.01, ha="left")
    _waveform(panels[0], picture)
    _mel(panels[1], picture)
    _codes(panels[2], picture)
    _text(panels[3], picture)
    panels[3].set_xlabel("seconds of the answer; what stands left of 0 is the text's lead")
    panels[0].set_xlim(-picture.delay / picture.frame_rate, max(len(picture.pcm) / picture.sample_rate, 0.1))
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be written ({error.strerror})") from error


def _waveform(axes: Axes, picture: AnswerPicture) -> None:
    seconds = np.arange(len(picture.pcm)) / picture.sample_rate
    axes.plot(seconds, picture.pcm, linewidth=0.4, color="#1f4e79", rasterized=True)
    axes.set_ylabel("waveform")
    axes.set_ylim(-1, 1)


def _mel(axes: Axes, picture: AnswerPicture) -> None:
    extent = (0.0, len(picture.pcm) / picture.sample_rate, 0.0, float(picture.mel.shape[1]))
    axes.imshow(picture.mel.T, aspect="auto", origin="lower", extent=extent, cmap="magma", interpolation="nearest")
    axes.set_ylabel("mel band")


def _codes(axes: Axes, picture: AnswerPicture) -> None:
    starts = np.arange(len(picture.codes)) / picture.frame_rate
    axes.hlines(picture.codes, starts, starts + 1 / picture.frame_rate, color="#a33b20", linewidth=2)
    axes.set_ylabel("semantic token")
    axes.grid(axis="y", alpha=0.3)


def _text(axes: Axes, picture: AnswerPicture) -> None:
    for step, piece in picture.text:
        second = (step - picture.delay) / picture.frame_rate
        axes.axvline(second, color="#888888", linewidth=0.4)
        axes.text(second, 0.04, _printable(piece), rotation=90, fontsize=7, va="bottom", parse_math=False)
    axes.set_ylabel("text token")
    axes.set_ylim(0, 1)
    axes.set_yticks([])


def _printable(piece: str) -> str:
    """The piece as the default font can show it: other scripts and control characters become a box."""
    return "".join(char if char.isascii() and char.isprintable() else "▯" for char in piece)
