"""A tiny text tokenizer in the released layout, written for tests: 256 bytes, a few merges, special tokens."""

import base64
import json
from dataclasses import replace
from pathlib import Path

from kimia.model.config import LMConfig
from kimia.model.text import RELEASE_ORDER, TextTokenizer

MERGES = [b" h", b"he", b"ll", b"hell", b"hello", b"12", b"Sx", b"'S", b" !", b"!\n", "你".encode(), b"\n\n", b"  "]
TOKENS = [bytes([255 - value]) for value in range(256)] + MERGES  # id of a byte is not the byte
BASE = len(TOKENS)
SPECIALS = 50

CONFIG = LMConfig(
    vocab_size=BASE + SPECIALS + 32,
    hidden_size=8,
    intermediate_size=8,
    layers=2,
    heads=2,
    kv_heads=1,
    max_positions=300,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mimo_layers=1,
    fork_layer=0,
    audio_delay=3,
    token_offset=BASE + SPECIALS,
    adaptor_input_dim=4,
    media_begin=BASE + 18,
    media_end=BASE + 20,
    pad_token=BASE + SPECIALS - 1,
)


def named(base: int = BASE) -> dict[int, str]:
    """The named special tokens in the release's order."""
    return {base + index: name for index, name in RELEASE_ORDER.items()}


def complete(base: int = BASE, specials: int = SPECIALS) -> dict[int, str]:
    """All special tokens, the reserved ones counted in order."""
    unnamed = [token for token in range(base, base + specials) if token not in named(base)]
    return {**named(base), **{token: f"<|reserved_token_{k}|>" for k, token in enumerate(unnamed)}}


def write_ranks(folder: Path, tokens: list[bytes]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path = folder / "tiktoken.model"
    path.write_text("".join(lines))
    return path


def write_names(folder: Path, names: dict[int, str], **more: object) -> None:
    listed = {str(token): {"content": name, "special": True} for token, name in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed, **more}))


def tiny_tokenizer(folder: Path, names: dict[int, str] | None = None, **changes: int) -> TextTokenizer:
    """Write both files and load them; `changes` replace fields of CONFIG."""
    write_ranks(folder, TOKENS)
    write_names(folder, complete() if names is None else names)
    return TextTokenizer.load(folder, replace(CONFIG, **changes))
