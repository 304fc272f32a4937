"""Bad input of every kind, as a user of the command line meets it: exit code 1, one usable line, no traceback."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

from kimia.cli import main
from tests.golden_data import COMMITTED

pytestmark = pytest.mark.unit

GOOD = COMMITTED / "e2e" / "audio" / "clip_b2.wav"
WAV_HEADER = GOOD.read_bytes()[:44]


def refused(capsys, *arguments) -> str:
    """Run the command and return its complaint: the last line of stderr."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert not captured.out.strip()
    complaint = captured.err.rstrip().splitlines()[-1]
    assert complaint.startswith("error: ")
    return complaint


# ---- audio ------------------------------------------------------------------------------------------------------


def no_channels() -> bytes:
    header = bytearray(WAV_HEADER)
    header[22:24] = struct.pack("<H", 0)
    return bytes(header) + bytes(3200)


def text_file() -> bytes:
    return b"Dear customer,\nthis is no sound.\n" * 50


BAD_AUDIO = {
    "empty file": (b"", "empty"),
    "only a header": (WAV_HEADER, "no samples"),
    "truncated header": (WAV_HEADER[:20], "not audio"),
    "text renamed .wav": (text_file(), "not audio"),
    "zero channels": (no_channels(), "not audio"),
    "random bytes": (bytes(range(256)) * 20, "not audio"),
}


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio_bytes(kind, tiny, tmp_path, capsys) -> None:
    content, reason = BAD_AUDIO[kind]
    (tmp_path / "call.wav").write_bytes(content)
    complaint = refused(capsys, "generate", "--model", tiny, "--audio", tmp_path / "call.wav", "--output", "text")
    assert reason in complaint
    assert "call.wav" in complaint


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(value, tiny, tmp_path, capsys) -> None:
    samples = np.zeros(16000, np.float32)
    samples[77] = value
    soundfile.write(tmp_path / "call.wav", samples, 16000, subtype="FLOAT")
    assert "NaN" in refused(capsys, "generate", "--model", tiny, "--audio", tmp_path / "call.wav", "--output", "text")


def test_rate_outside_the_range(tiny, tmp_path, capsys) -> None:
    soundfile.write(tmp_path / "call.wav", np.zeros(4000), 4000)
    assert "8000" in refused(capsys, "generate", "--model", tiny, "--audio", tmp_path / "call.wav", "--output", "text")


def test_two_hours(tiny, tmp_path, capsys) -> None:
    """Refused from the header: the file is sparse and never read."""
    frames = 2 * 3600 * 8000
    header = b"RIFF" + struct.pack("<I", 36 + 2 * frames) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16) + b"data" + struct.pack("<I", 2 * frames)
    path = tmp_path / "call.wav"
    path.write_bytes(header)
    os.truncate(path, len(header) + 2 * frames)
    assert "3600 s" in refused(capsys, "generate", "--model", tiny, "--audio", path, "--output", "text")


@pytest.mark.parametrize("place", ["missing.wav", "."])
def test_no_file(place, tiny, tmp_path, capsys) -> None:
    complaint = refused(capsys, "generate", "--model", tiny, "--audio", tmp_path / place, "--output", "text")
    assert "cannot be opened" in complaint


def test_one_sample_is_legal(tiny, tmp_path) -> None:
    soundfile.write(tmp_path / "call.wav", np.array([0.5]), 16000)
    arguments = ["--audio", str(tmp_path / "call.wav"), "--output", "text", "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(tiny), *arguments]) == 0


# ---- conversations ----------------------------------------------------------------------------------------------

USER = {"role": "user", "message_type": "text", "content": "x"}
BAD_CHATS = {
    "empty conversation": ([], "empty"),
    "not a list": ({"messages": []}, "list"),
    "system role": ([{**USER, "role": "system"}], "system role"),
    "unknown type": ([{**USER, "message_type": "image"}], "image"),
    "unknown field": ([{**USER, "language": "en"}], "language"),
    "no content": ([{"role": "user", "message_type": "text"}], "message 0"),
    "number as text": ([{**USER, "content": 5}], "string"),
    "ends with the assistant": ([USER, {**USER, "role": "assistant"}], "ends with the assistant"),
    "code outside the vocabulary": (
        [{"role": "assistant", "message_type": "audio-text", "audio_tokens": [7], "text_tokens": []}, USER],
        "audio_tokens[0]",
    ),
    "transcript longer than its audio": (
        [{"role": "assistant", "message_type": "audio-text", "content": ["clip.wav", "word " * 60]}, USER],
        "transcript",
    ),
}


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_bad_conversations(kind, tiny, tmp_path, capsys) -> None:
    chat, reason = BAD_CHATS[kind]
    (tmp_path / "clip.wav").write_bytes(GOOD.read_bytes())
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    assert reason in refused(capsys, "generate", "--model", tiny, tmp_path / "chat.json", "--output", "text")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 200_000, None])
def test_unreadable_chat_file(content, tiny, tmp_path, capsys) -> None:
    if content is not None:
        (tmp_path / "chat.json").write_bytes(content)
    assert "chat.json" in refused(capsys, "generate", "--model", tiny, tmp_path / "chat.json")


def test_longer_than_the_context(tiny, tmp_path, capsys) -> None:
    soundfile.write(tmp_path / "call.wav", np.zeros(8000 * 700, np.float32), 8000)
    complaint = refused(
        capsys,
        "generate",
        "--model",
        tiny,
        "--audio",
        tmp_path / "call.wav",
        "--output",
        "text",
        "--preset",
        "low-latency",
    )
    assert "8192" in complaint


# ---- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--text-temperature", "-1"),
        ("--audio-temperature", "nan"),
        ("--text-repetition-penalty", "0"),
        ("--max-new-tokens", "0"),
        ("--seed", "-4"),
        ("--device", "abacus"),
        ("--device", "meta"),
    ],
)
def test_bad_options(option, value, tiny, capsys) -> None:
    refused(capsys, "generate", "--model", tiny, "--text", "x", option, value)


# ---- checkpoints ------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def drop_shard(folder) -> str:
    (folder / "model-2-of-9.safetensors").unlink()
    return "model-2-of-9.safetensors"


def cut_shard(folder) -> str:
    path = folder / "model-2-of-9.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model-2-of-9.safetensors"


def extra_key(folder) -> str:
    path = folder / "whisper-large-v3" / "model.safetensors"
    save_file(load_file(path) | {"model.encoder.extra.weight": torch.zeros(2)}, path)
    return "extra.weight"


def wrong_shape(folder) -> str:
    path = folder / "glm-4-voice-tokenizer" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"codebook.weight": tensors["codebook.weight"][:, :-1].contiguous()}, path)
    return "codebook.weight"


def half_a_config(folder) -> str:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: fields[name] for name in list(fields)[: len(fields) // 2]}))
    return "is missing"


def cut_config(folder) -> str:
    path = folder / "config.json"
    path.write_text(path.read_text()[:200])
    return "config.json"


def no_config(folder) -> str:
    (folder / "audio_detokenizer" / "config.yaml").unlink()
    return "config.yaml"


def other_codebook(folder) -> str:
    path = folder / "audio_detokenizer" / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    fields["model"]["dit"]["semantic_vocab_size"] += 1
    path.write_text(yaml.safe_dump(fields))
    return "do not fit together"


def pickle_payload(folder) -> str:
    with (folder / "vocoder" / "model.pt").open("wb") as file:
        pickle.dump({"generator": Payload()}, file)
    return "model.pt"


def zipped_payload(folder) -> str:
    torch.save({"generator": Payload()}, folder / "vocoder" / "model.pt")
    return "model.pt"


def no_vocabulary(folder) -> str:
    (folder / "tiktoken.model").write_text("not base64\n")
    return "tiktoken.model"


DAMAGE = [
    drop_shard,
    cut_shard,
    extra_key,
    wrong_shape,
    half_a_config,
    cut_config,
    no_config,
    other_codebook,
    pickle_payload,
    zipped_payload,
    no_vocabulary,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints(damage, tiny_copy, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    named = damage(tiny_copy)
    assert named in refused(capsys, "generate", "--model", tiny_copy, "--text", "x")
    assert not (tmp_path / "payload-ran").exists()


def test_no_such_model(capsys) -> None:
    assert "neither a folder nor a hub id" in refused(capsys, "generate", "--model", "/no/such/folder", "--text", "x")
