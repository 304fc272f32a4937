"""Arguments that commands share: messages in order, relative paths, upstream's sampling names."""

import argparse
import inspect
import json
from pathlib import Path
from typing import get_type_hints

import pytest

from kimia.cli.arguments import (
    SAMPLING,
    add_chat,
    add_model,
    add_sampling,
    chat_messages,
    model_location,
    read_chat,
    sampling_options,
)
from kimia.errors import ConversationError, ParameterError
from kimia.model.sampler import Sampling
from kimia.pipeline import Options

pytestmark = pytest.mark.unit


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_chat(parser)
    add_model(parser)
    add_sampling(parser)
    return parser.parse_args(arguments)


def test_text_and_audio_keep_their_order() -> None:
    messages = chat_messages(parsed("--text", "a", "--audio", "b.wav", "--text", "c"))
    assert [(message["message_type"], message["content"]) for message in messages] == [
        ("text", "a"),
        ("audio", "b.wav"),
        ("text", "c"),
    ]
    assert {message["role"] for message in messages} == {"user"}


def test_audio_paths_are_relative_to_the_chat(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "message_type": "audio", "content": "a.wav"},
        {"role": "assistant", "message_type": "audio-text", "content": ["b.wav", "b.wav"]},
        {"role": "assistant", "message_type": "audio-text", "content": [None, "x"], "audio_tokens": []},
        {"role": "user", "message_type": "audio", "content": "/c.wav"},
        {"role": "user", "message_type": "text", "content": "d.wav"},
        "no message at all",
    ]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    contents = [message["content"] for message in read_chat(tmp_path / "chat.json")[:-1]]
    assert contents == [
        str(tmp_path / "a.wav"),
        [str(tmp_path / "b.wav"), "b.wav"],
        [None, "x"],
        "/c.wav",
        "d.wav",
    ]


def test_a_chat_must_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text("{}")
    with pytest.raises(ConversationError, match="list"):
        read_chat(tmp_path / "chat.json")


def test_defaults_are_those_of_the_sampler() -> None:
    options = sampling_options(parsed())
    assert options.pop("seed") is None
    assert options.pop("max_new_tokens") == -1
    assert Sampling.from_arguments(options) == Sampling()


def test_every_option_of_a_turn_has_an_argument() -> None:
    assert set(get_type_hints(Options)) - {"preset"} == {*SAMPLING, "max_new_tokens", "seed"}


def test_model_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("KIMIA_MODEL", "somewhere")
    assert model_location(parsed()) == "somewhere"
    assert model_location(parsed("--model", "elsewhere")) == "elsewhere"
    monkeypatch.delenv("KIMIA_MODEL")
    with pytest.raises(ParameterError, match="checkpoint new"):
        model_location(parsed())


def test_help_fits_a_terminal_and_names_defaults(capsys) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    assert inspect.cleandoc(capsys.readouterr().out).count("default") >= len(SAMPLING)
