"""What the README shows works: its Python runs, its links and commands exist."""

import re
from pathlib import Path

import pytest

from kimia.cli import COMMANDS
from tests.running import running

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run(tiny, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    code = code.replace('"checkpoints/micro"', f'"{tiny}"')
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["done"].steps == 60
    assert names["wav"].shape[0] == 1
    assert "[0: " in capsys.readouterr().out


def test_the_client_examples_run(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python client\n(.*?)```", README, flags=re.DOTALL)
    with running("--fake") as service:
        code = "\n".join(examples).replace("localhost:50051", service.address)
        exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert len(examples) == 2
    assert "[0: " in out
    assert "3 turns remembered" in out


def test_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_commands_exist() -> None:
    shown = set(re.findall(r"(?:`|^    )kimia ([a-z-]+)", README, flags=re.MULTILINE))
    assert shown == set(COMMANDS)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"make ([a-z0-9]+)", page):
            assert f"\n{target}:" in makefile
