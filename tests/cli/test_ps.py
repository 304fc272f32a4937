"""`kimia ps`: replicas, rows, reservations and queues, as the store has them."""

import asyncio
import json

import pytest

from kimia.cli import main
from kimia.cli.ps import StageLine, look, table
from kimia.stage import DETOKENIZER, LLM, TOKENIZER
from kimia.streams.ledger import Ledger
from kimia.streams.wire import Wire, WireOptions

pytestmark = pytest.mark.unit


async def announced(url: str) -> None:
    """Two workers of the language model, one of each other stage, one session."""
    wire = await Wire.connect(url)
    ledger = Ledger(wire)
    await ledger.announce(LLM, "llm-a", 4, 3)
    await ledger.announce(LLM, "llm-b", 4, 1)
    await ledger.announce(TOKENIZER, "tok-a", 2, 0)
    await ledger.announce(DETOKENIZER, "det-a", 2, 2)
    await ledger.reserve("session", "acme", (LLM, DETOKENIZER), 60.0)
    await wire.aclose()


async def test_what_is_there(valkey_url) -> None:
    await announced(valkey_url)
    tokenizer, llm, detokenizer = await look(valkey_url, 1)
    assert tokenizer == StageLine("tokenizer", {"tok-a": (0, 2)}, 2, 0, 0, 0)
    assert llm == StageLine("llm", {"llm-a": (3, 4), "llm-b": (1, 4)}, 8, 1, 0, 0)
    assert (llm.used, detokenizer.reserved) == (4, 1)


async def test_the_command(valkey_url, capsys) -> None:
    await announced(valkey_url)
    assert await asyncio.to_thread(main, ["ps", "--redis", valkey_url]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["stage", "replicas", "rows", "sessions", "waiting", "running"]
    assert ["llm", "2", "4/8", "1/8", "0", "0"] in [line.split() for line in shown]
    assert await asyncio.to_thread(main, ["ps", "--redis", valkey_url, "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["stage"] for item in objects] == ["tokenizer", "llm", "detokenizer"]
    assert objects[1]["workers"]["llm-a"] == [3, 4]


async def test_a_stage_without_worker_is_a_failure(valkey_url, capsys) -> None:
    assert await asyncio.to_thread(main, ["ps", "--redis", valkey_url]) == 1
    assert "no live worker: tokenizer, llm, detokenizer" in capsys.readouterr().out


async def test_other_partitions_than_the_service_has_are_refused(valkey_url, capsys) -> None:
    """Of a service of sixteen, a look at the first alone would show empty queues."""
    wire = await Wire.connect(valkey_url, options=WireOptions(partitions=16))
    await wire.agree()
    await wire.aclose()
    assert await asyncio.to_thread(main, ["ps", "--redis", valkey_url]) == 1
    assert "used with 16 partitions, not with 1" in capsys.readouterr().err


def test_nobody_answers(capsys) -> None:
    assert main(["ps", "--redis", "redis://127.0.0.1:1/0"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("wrong", ["many", "0", "-3", "1025"])
def test_partitions_that_no_service_has(wrong, monkeypatch, capsys) -> None:
    """Named, or left behind in the environment: one line that says what there is, before anything is asked."""
    monkeypatch.setenv("KIMIA_PARTITIONS", wrong)
    for given in ([], [f"--partitions={wrong}"]):
        with pytest.raises(SystemExit, match="2"):
            main(["ps", "--redis", "redis://127.0.0.1:1/0", *given])
        assert f"argument --partitions: a service has 1 to 1024 partitions, got '{wrong}'" in capsys.readouterr().err


def test_columns_stand_under_one_another() -> None:
    lines = [StageLine("tokenizer", {"t": (0, 100)}, 100, 12, 3, 4), StageLine("llm", {"l": (1, 2)}, 2, 2, 300, 1)]
    rows = [line for line in table(lines).splitlines() if not line.startswith("  ")]
    assert len({len(row) for row in rows}) == 1
