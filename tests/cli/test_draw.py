"""The picture of an answer: files of both formats, edge cases, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimia.cli.draw import AnswerPicture, check_format, draw_answer
from kimia.errors import ParameterError

pytestmark = pytest.mark.unit

PICTURE = AnswerPicture(
    title="ten tokens",
    pcm=np.sin(np.arange(19200) / 30).astype(np.float32),
    sample_rate=24000,
    mel=np.random.default_rng(0).normal(size=(40, 80)).astype(np.float32),
    codes=list(range(10)),
    text=[(0, "hello"), (1, "$x"), (2, "你"), (3, "\n")],
    delay=6,
    frame_rate=12.5,
)


def test_svg_holds_its_words(tmp_path: Path, monkeypatch) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw_answer(PICTURE, tmp_path / "answer.svg")
    drawn = (tmp_path / "answer.svg").read_text()
    for word in ("ten tokens", "waveform", "mel band", "semantic token", "text token", "hello", "$x", "▯"):
        assert word in drawn


def test_png_depends_on_what_is_drawn(tmp_path: Path) -> None:
    quiet = replace(PICTURE, pcm=PICTURE.pcm * 0.1)
    for name, picture in (("a", PICTURE), ("b", PICTURE), ("c", quiet)):
        draw_answer(picture, tmp_path / f"{name}.png")
    same, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert same == again != other


def test_an_answer_without_text(tmp_path: Path) -> None:
    draw_answer(replace(PICTURE, text=[]), tmp_path / "answer.png")
    assert (tmp_path / "answer.png").stat().st_size > 5000


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cannot be written"):
        draw_answer(PICTURE, tmp_path / "no" / "such" / "folder" / "answer.png")


@pytest.mark.parametrize("name", ["answer.pdf", "answer", "answer.jpg"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(ParameterError, match=r"\.svg or \.png"):
        check_format(Path(name))


def test_without_matplotlib_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ParameterError, match=r"kimia\[plot\]"):
        check_format(Path("answer.svg"))
