"""The `kimia` entry point: lazy commands, exit codes, errors without tracebacks."""

import subprocess
import sys
import types

import pytest

import kimia.cli
from kimia.errors import AudioError

pytestmark = pytest.mark.unit


@pytest.fixture
def command(monkeypatch):
    """Install a command `probe` whose run() does what the test says."""

    def install(run) -> None:
        module = types.ModuleType("kimia.cli.probe")
        module.configure = lambda parser: parser.add_argument("--word")
        module.run = run
        monkeypatch.setitem(sys.modules, "kimia.cli.probe", module)
        monkeypatch.setitem(kimia.cli.COMMANDS, "probe", "a command of this test")

    return install


def test_exit_code_of_the_command(command) -> None:
    command(lambda args: 7 if args.word == "x" else 0)
    assert kimia.cli.main(["probe", "--word", "x"]) == 7


def test_error_is_one_line_on_stderr(command, capsys) -> None:
    def run(args):
        raise AudioError("the file is empty")

    command(run)
    assert kimia.cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "error: the file is empty\n"


def test_interrupt_is_130(command) -> None:
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert kimia.cli.main(["probe"]) == 130


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["probe", "--nonsense"]])
def test_wrong_usage_is_2(command, arguments, capsys) -> None:
    command(lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        kimia.cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: kimia" in capsys.readouterr().err


def test_help_lists_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        kimia.cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in kimia.cli.COMMANDS)


def test_the_entry_point_needs_no_torch() -> None:
    probe = "import sys, kimia, kimia.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
