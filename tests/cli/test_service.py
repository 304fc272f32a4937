"""What the commands share that talk to a running service."""

import argparse
import os
import wave

import pytest

from kimia.cli.service import add_server, check_address, check_writable, open_client, write_wav
from kimia.errors import ParameterError, UnavailableError
from tests.client.scripted import WHOLE
from tests.client.turns import question

pytestmark = pytest.mark.unit


def arguments(*given: str, required: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_server(parser, required=required)
    return parser.parse_args(given)


def test_the_server_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("KIMIA_SERVER", "elsewhere:1")
    assert arguments().server == "elsewhere:1"
    assert arguments("--server", "here:2").server == "here:2"
    assert arguments(required=False).server is None
    monkeypatch.setenv("KIMIA_SERVER", "")
    assert arguments().server == "localhost:50051"
    monkeypatch.delenv("KIMIA_SERVER")
    assert arguments().server == "localhost:50051"


def test_nobody_answers() -> None:
    with pytest.raises(UnavailableError, match="kimia up"):
        open_client(arguments("--server", "127.0.0.1:1"), timeout=0.05)


@pytest.mark.parametrize("wrong", ["", "localhost", "http://localhost:50051", "https://voice.example.com"])
def test_addresses_that_are_none(wrong) -> None:
    """At once, and not after a timeout that blames the service."""
    with pytest.raises(ParameterError, match="HOST:PORT"):
        open_client(arguments("--server", wrong))


@pytest.mark.parametrize("name", ["localhost:1", "[::1]:1", "dns:///voice", "ipv4:10.0.0.5:1,10.0.0.6:1", "unix:/a"])
def test_names_that_grpc_resolves_are_left_to_it(name) -> None:
    check_address(name)


def test_an_answer_is_written_as_wav(scripted, tmp_path) -> None:
    scripted.generate = [WHOLE]
    with open_client(arguments("--server", scripted.target, "--tenant", "acme")) as kimia:
        answer = question(kimia).collect()
    assert scripted.requests[0].caller.tenant == "acme"
    write_wav(tmp_path / "a.wav", answer.pcm, answer.sample_rate)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        assert file.readframes(1000) == answer.pcm
    with pytest.raises(ParameterError, match="cannot be written"):
        write_wav(tmp_path / "no" / "a.wav", answer.pcm, answer.sample_rate)


def test_places_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    check_writable(tmp_path / "new.wav")
    with pytest.raises(ParameterError, match="does not exist"):
        check_writable(tmp_path / "no" / "new.wav")
    with pytest.raises(ParameterError, match="is not a file"):
        check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ParameterError, match="no permission"):
        check_writable(tmp_path / "new.wav")
