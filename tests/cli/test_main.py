"""The `kimia` entry point: lazy commands, exit codes, errors without tracebacks."""

import os
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


def test_a_full_disk_behind_stdout_is_one_line(command, capsys, monkeypatch) -> None:
    def run(args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kimia.cli, "_discard_output", lambda: None)
    command(run)
    assert kimia.cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


PRINTING = "import sys, types, kimia.cli as c; m = types.ModuleType('kimia.cli.probe'); m.configure = lambda p: None\n"
PRINTING += "m.run = lambda a: print('你好') or print('told', file=sys.stderr) or 0\n"
PRINTING += "sys.modules['kimia.cli.probe'] = m; c.COMMANDS['probe'] = 'x'; sys.exit(c.main(['probe']))"


def printed(redirection: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command that prints to both streams, under a shell's redirection."""
    return subprocess.run(
        ["/bin/sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, PRINTING],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def test_what_the_stream_cannot_encode_is_escaped() -> None:
    done = printed("", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout == "\\u4f60\\u597d\n"


@pytest.mark.parametrize(("redirection", "code"), [("2>&-", 0), (">&-", 0), (">/dev/full", 1), ("| true", 0)])
def test_closed_and_full_streams_give_no_traceback(redirection: str, code: int) -> None:
    done = printed(redirection)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "told" not in done.stdout


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        kimia.cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("kimia ")


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
