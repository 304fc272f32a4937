"""Logs: one line per event, nobody's words in it."""

import json
import logging

import pytest
import structlog

from kimia.runtime.logs import bound_turn, configure, get_logger
from kimia.runtime.settings import Settings
from kimia.v1.conversation_pb2 import Text

pytestmark = pytest.mark.unit


@pytest.fixture
def lines(capsys):
    """What has been logged since it was last called; the logging of the test run comes back afterwards."""
    root = logging.getLogger()
    handlers, level, before = list(root.handlers), root.level, structlog.get_config()

    def logged():
        return capsys.readouterr().err.splitlines()

    yield logged
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**before)


def test_json_lines_carry_service_level_time_and_fields(lines):
    configure(Settings(), "llm")
    get_logger(worker="w1").info("claimed", queued_seconds=0.5)
    (line,) = lines()
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {"event": "claimed", "level": "info", "service": "llm", "worker": "w1", "queued_seconds": 0.5}


def test_the_turn_is_bound_while_it_runs(lines):
    configure(Settings(), "llm")
    log = get_logger()
    with bound_turn("s1.t1", attempt=2):
        log.info("inside")
    log.info("outside")
    inside, outside = map(json.loads, lines())
    assert (inside["turn"], inside["attempt"]) == ("s1.t1", 2)
    assert "turn" not in outside


def test_less_than_the_level_is_silent(lines):
    configure(Settings(log_level="warning"), "llm")
    get_logger().info("quiet")
    get_logger().warning("loud")
    assert [json.loads(line)["event"] for line in lines()] == ["loud"]


def test_other_libraries_log_the_same_way(lines):
    configure(Settings(), "llm")
    logging.getLogger("grpc").warning("from %s", "afar")
    entry = json.loads(lines()[0])
    assert (entry["event"], entry["level"], entry["service"]) == ("from afar", "warning", "llm")


@pytest.mark.parametrize("style", ["json", "text"])
def test_neither_sound_nor_text_is_logged(lines, style):
    configure(Settings(log_format=style), "llm")
    secret = Text(text="swordfish")
    get_logger().info("x", pcm=b"swordfish", message=secret, parts=[secret, b"swordfish"], more={"a": secret}, n=1)
    (line,) = lines()
    assert "swordfish" not in line
    assert "<9 bytes>" in line
    assert "<Text>" in line


def test_long_values_are_cut(lines):
    configure(Settings(), "llm")
    get_logger().info("x", value="y" * 2000)
    value = json.loads(lines()[0])["value"]
    assert value.endswith("(2000 characters)")
    assert len(value) < 600


@pytest.mark.parametrize("style", ["json", "text"])
def test_tracebacks_carry_no_locals(lines, style):
    configure(Settings(log_format=style), "llm")
    answer = "sword" + "fish"
    try:
        raise RuntimeError("broken") from KeyError("cause")
    except RuntimeError:
        get_logger().exception("failed", length=len(answer))
    logged = lines()
    text = "\n".join(logged)
    assert "RuntimeError: broken" in text
    assert "KeyError" in text
    assert "swordfish" not in text
    assert len(logged) == 1 or style == "text"


def test_text_lines_are_readable(lines):
    configure(Settings(log_format="text"), "llm")
    get_logger().info("claimed", rows=3)
    (line,) = lines()
    assert "claimed" in line
    assert "rows=3" in line
