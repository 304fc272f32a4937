"""Where the time of a turn went: phases, text, picture."""

import pytest

from kimia.cli.waterfall import Phase, Waterfall, as_text, draw_waterfall, waterfall
from kimia.client import ClientTimes, Latency, StageLatency
from kimia.errors import ParameterError

pytestmark = pytest.mark.unit

STAGES = (
    StageLatency("tokenizer", 0.0, 0.002, 0.03, 0.05, 0.04, "t-1", 0),
    StageLatency("llm", 0.05, 0.06, 0.1, 0.5, 0.3, "l-1", 1),
    StageLatency("detokenizer", 0.1, 0.1, 0.3, 0.6, 0.2, "d-1", 2),
)
LATENCY = Latency(first_text=0.1, first_audio=0.3, total=0.6, stages=STAGES)
TIMES = ClientTimes(started=0.03, first_text=0.13, first_audio=0.325, total=0.64)


def named(fall: Waterfall) -> dict[tuple[str, str], Phase]:
    return {(phase.stage, phase.name): phase for phase in fall.phases}


def test_phases_stand_on_the_callers_axis() -> None:
    phases = named(waterfall(LATENCY, TIMES))
    begun = 0.325 - 0.3  # the mark that came soonest after it happened
    assert phases["request", "accepted"].end == pytest.approx(begun)
    assert phases["llm", "queue"].begin == pytest.approx(begun + 0.05)
    assert phases["llm", "prefill"].end == pytest.approx(begun + 0.1)
    assert phases["llm", "decode"].end == pytest.approx(begun + 0.5)
    assert phases["detokenizer", "first chunk"].end == pytest.approx(0.325)
    assert (phases["reply", "arrived"].begin, phases["reply", "arrived"].end) == (pytest.approx(begun + 0.6), 0.64)


def test_phases_follow_one_another_in_each_stage() -> None:
    fall = waterfall(LATENCY, TIMES)
    for before, after in zip(fall.phases, fall.phases[1:], strict=False):
        if before.stage == after.stage:
            assert before.end == pytest.approx(after.begin)
    assert all(0 <= phase.begin <= phase.end <= fall.total for phase in fall.phases)


def test_the_tokenizer_has_one_phase_of_work() -> None:
    assert [name for stage, name in named(waterfall(LATENCY, TIMES)) if stage == "tokenizer"] == ["queue", "encode"]


def test_a_turn_of_text_only() -> None:
    fall = waterfall(Latency(0.1, None, 0.5, STAGES[1:2]), ClientTimes(0.01, 0.11, None, 0.52))
    assert [stage for stage, _ in named(fall)] == ["request", "llm", "llm", "llm", "reply"]
    assert [name for name, _ in fall.marks] == ["first text", "end"]


def test_nothing_is_known() -> None:
    fall = waterfall(Latency(None, None, None), ClientTimes())
    assert "request" in as_text(fall)


def test_bars_stand_under_one_another() -> None:
    text = as_text(waterfall(LATENCY, TIMES), width=104)
    rows = {(line[:12].strip() or "-", line[13:24].strip()): line for line in text.splitlines()}
    bar = {name: line[41:] for (_, name), line in rows.items()}
    assert rows["tokenizer", "queue"][41:].strip() == "·"
    assert bar["prefill"].strip("▒ ") == ""
    assert abs(len(bar["prefill"]) - (len(bar["decode"]) - len(bar["decode"].lstrip()))) <= 1
    assert bar["synthesis"].endswith("█")
    assert "the caller got: first text 130, first audio 325, end 640" in text
    assert "llm 300 ms computing, taken over once" in text
    assert "detokenizer 200 ms computing, taken over 2 times" in text


@pytest.mark.parametrize("width", [0, 80, 140])
def test_no_line_of_the_chart_is_longer_than_the_screen(width) -> None:
    chart = as_text(waterfall(LATENCY, TIMES), width).splitlines()[:-2]
    assert max(map(len, chart)) <= max(width, 64) + 1


def test_plain_text_is_ascii() -> None:
    assert as_text(waterfall(LATENCY, TIMES), plain=True).isascii()


@pytest.mark.parametrize(("name", "magic"), [("turn.svg", b"<?xml"), ("turn.png", b"\x89PNG")])
def test_the_picture(tmp_path, name, magic) -> None:
    draw_waterfall(waterfall(LATENCY, TIMES), "33 positions in", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_a_picture_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(ParameterError, match="cannot be written"):
        draw_waterfall(waterfall(LATENCY, TIMES), "", tmp_path / "no" / "turn.svg")
    with pytest.raises(ParameterError, match=r"written as \.svg or \.png"):
        draw_waterfall(waterfall(LATENCY, TIMES), "", tmp_path / "turn.pdf")
