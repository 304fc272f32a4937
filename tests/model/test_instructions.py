"""The one default instruction: clients and the command line ask with it, and it can be had without torch."""

import argparse
import inspect
import subprocess
import sys

import pytest

from kimia.cli.transcribe import configure
from kimia.client.aio import AsyncKimia
from kimia.client.sync import Kimia
from kimia.model.instructions import TRANSCRIBE

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("client", [Kimia, AsyncKimia])
def test_clients_ask_with_it(client):
    assert inspect.signature(client.transcribe).parameters["instruction"].default == TRANSCRIBE


def test_the_command_asks_with_it():
    parser = argparse.ArgumentParser()
    configure(parser)
    assert parser.parse_args(["call.wav"]).instruction == TRANSCRIBE


def test_it_can_be_had_without_torch():
    code = "import sys, kimia.model.instructions; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
