"""What libraries say while they are imported."""

import logging
import subprocess
import sys

import pytest

from kimia.model.quiet import LOGGERS, quiet

pytestmark = pytest.mark.unit


def test_only_errors_are_logged_meanwhile(caplog) -> None:
    for name in LOGGERS:
        logger = logging.getLogger(name)
        with quiet():
            logger.warning("for programmers")
            logger.error("for all")
        logger.warning("afterwards")
    assert [record.message for record in caplog.records] == ["for all", "afterwards"] * len(LOGGERS)


def test_a_process_that_loads_a_quantised_model_says_nothing(tiny) -> None:
    code = f"from kimia.pipeline import KimiAudio; KimiAudio({str(tiny)!r}, False, device='cpu', quantize='int8')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
