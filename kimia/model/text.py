"""The text tokenizer: byte-pair encoding with Qwen's split pattern, and the control symbols by name.

Notes
- Ids are laid out as [base vocabulary | special tokens | audio codes]. The base ids are the ranks of `tiktoken.model`;
  audio code c is id `kimia_token_offset + c` and is not text.
- Special ids are resolved by name through `tokenizer_config.json` (added_tokens_decoder), since their numbers differ
  between checkpoints; without that map the release's order is used. Both are checked against `config.json`.
- Text is encoded without recognising special tokens: a user who types `<|im_msg_end|>` gets ordinary characters, so
  nobody can end a turn or open a media segment from inside a message.
- Ranks are parsed here because tiktoken's loader caches files by their path alone.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from kimia.errors import CheckpointError, ConfigError, ParameterError
from kimia.model.config import Fields, LMConfig, read_fields

SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with at most one leading sign or space
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # white space, its last character left to the next word
        r"\s+",
    )
)

# Cuts of very long inputs, as in the release: they bound the work of one regular-expression match and one merge.
SLICE_CHARACTERS = 400_000
RUN_CHARACTERS = 25_000
RUNS = re.compile(r"\s+|\S+")

# Index of each named special token after the base vocabulary, in the release; the rest are reserved.
RELEASE_ORDER = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_msg_end|>",
    3: "<|im_user_msg_start|>",
    4: "<|im_assistant_msg_start|>",
    9: "[EOT]",
    18: "<|im_media_begin|>",
    20: "<|im_media_end|>",
    23: "<|im_kimia_text_blank|>",
    24: "<|im_kimia_text_eos|>",
    27: "<|im_kimia_user_msg_start|>",
    28: "<|im_kimia_assistant_msg_start|>",
    32: "<|im_kimia_speech_ct_id|>",
    33: "<|im_kimia_speech_ctd_id|>",
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control symbols that a prompt is made of."""

    user_start: int
    assistant_start: int
    blank: int  # filler of either stream
    media_begin: int
    media_end: int
    ct: int  # an audio turn ends, text is wanted
    ctd: int  # an audio turn ends, text and speech are wanted
    msg_end: int  # end of a turn
    text_eos: int  # end of the text stream
    pad: int

    @classmethod
    def resolve(cls, names: Mapping[int, str], config: LMConfig, source: str) -> SpecialTokens:
        """Find each symbol by name. Raises ConfigError when one is absent or contradicts `config.json`."""
        ids = {name: token for token, name in names.items()}
        missing = [name for name in SYMBOLS.values() if name not in ids]
        if missing:
            raise ConfigError(f"{source}: no id is given for {', '.join(missing)}")
        tokens = cls(pad=config.pad_token, **{field: ids[name] for field, name in SYMBOLS.items()})
        for field, stated in (("media_begin", config.media_begin), ("media_end", config.media_end)):
            if getattr(tokens, field) != stated:
                raise ConfigError(
                    f"{source}: {SYMBOLS[field]} has id {getattr(tokens, field)}, config.json says "
                    f"kimia_{field} = {stated}; do both files belong to the same checkpoint?"
                )
        if tokens.pad not in names:
            raise ConfigError(f"{source}: pad_token_id {tokens.pad} of config.json is not a special token")
        return tokens


SYMBOLS = {
    "user_start": "<|im_kimia_user_msg_start|>",
    "assistant_start": "<|im_kimia_assistant_msg_start|>",
    "blank": "<|im_kimia_text_blank|>",
    "media_begin": "<|im_media_begin|>",
    "media_end": "<|im_media_end|>",
    "ct": "<|im_kimia_speech_ct_id|>",
    "ctd": "<|im_kimia_speech_ctd_id|>",
    "msg_end": "<|im_msg_end|>",
    "text_eos": "<|im_kimia_text_eos|>",
}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the `base64 rank` lines of `tiktoken.model`: token bytes -> id.

    Raises CheckpointError when unreadable, ConfigError when a line is malformed, the ranks have gaps or a byte has no
    token (some text could then not be encoded).
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(f"{path}: line {number} is not `base64 rank`; is the file complete?") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(f"{path}: the ranks of {len(ranks)} distinct tokens do not count 0, 1, 2, ...")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise ConfigError(f"{path}: some single bytes have no token; is the file complete?")
    return ranks


def _listed_names(fields: Fields) -> dict[int, str]:
    """The special tokens that `added_tokens_decoder` lists, id -> name; empty when the map is absent."""
    listed = fields.values.get("added_tokens_decoder") or {}
    try:
        names = {int(token): entry["content"] for token, entry in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{fields.source}: added_tokens_decoder must map ids to {{'content': name}}") from error
    if not all(isinstance(name, str) for name in names.values()) or len(set(names.values())) != len(names):
        raise ConfigError(f"{fields.source}: added_tokens_decoder must give each special token a name of its own")
    return names


def _check_listed(names: Mapping[int, str], fields: Fields, base: int, config: LMConfig) -> None:
    """Compare the listed special tokens with the vocabulary around them; any part of them may be listed."""
    source, end = fields.source, config.token_offset
    outside = [token for token in names if not base <= token < end]
    if outside:
        raise ConfigError(
            f"{source}: special token {outside[0]} lies outside {base}..{end - 1}, the ids between "
            f"the {base} lines of tiktoken.model and kimia_token_offset"
        )
    padding = fields.values.get("pad_token")
    for token, name in names.items():
        if name == padding and token != config.pad_token:
            raise ConfigError(f"{source}: pad_token has id {token}, config.json says {config.pad_token}")


def _special_names(fields: Fields, base: int, config: LMConfig) -> dict[int, str]:
    """Name of every id from `base` to the first audio code; those not listed are reserved tokens, counted in order."""
    if config.token_offset <= base:
        raise ConfigError(
            f"kimia_token_offset {config.token_offset} of config.json leaves no special tokens after "
            f"the {base} lines of tiktoken.model"
        )
    listed = _listed_names(fields)
    if listed:
        _check_listed(listed, fields, base, config)
    else:
        listed = {base + index: name for index, name in RELEASE_ORDER.items() if base + index < config.token_offset}
        if config.pad_token != config.token_offset - 1:
            raise ConfigError(
                f"{fields.source}: has no added_tokens_decoder, and pad_token_id {config.pad_token} is not the last "
                f"special token {config.token_offset - 1} as in the release; add the map"
            )
    taken = set(listed.values())
    reserved = (f"<|reserved_token_{k}|>" for k in range(config.token_offset))
    unused = (name for name in reserved if name not in taken)
    return {token: listed.get(token) or next(unused) for token in range(base, config.token_offset)}


def _slices(text: str) -> Iterator[str]:
    """Cut text into slices whose runs of (non-)white space are bounded; almost every text is one slice."""
    for begin in range(0, len(text), SLICE_CHARACTERS):
        part = text[begin : begin + SLICE_CHARACTERS]
        cuts = [
            cut
            for run in RUNS.finditer(part)
            for cut in range(run.start() + RUN_CHARACTERS, run.end(), RUN_CHARACTERS)
        ]  # fmt: skip
        for left, right in zip([0, *cuts], [*cuts, len(part)], strict=True):
            yield part[left:right]


def check_encodable(text: str) -> None:
    """Raise ParameterError when `text` holds a lone surrogate, which no UTF-8 text can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "decode the input as UTF-8 or UTF-16 before passing it on"
        ) from error


class TextTokenizer:
    """Text <-> ids, and the names of the special ids. Immutable after loading; shared by all conversations."""

    def __init__(self, ranks: Mapping[bytes, int], names: Mapping[int, str], special: SpecialTokens) -> None:
        self.base = len(ranks)  # id of the first special token
        self.size = len(ranks) + len(names)  # id of audio code 0
        self.special = special
        self._coder = tiktoken.Encoding(
            "kimia",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=dict(ranks),
            special_tokens={name: token for token, name in names.items()},
        )

    @classmethod
    def load(cls, folder: Path, config: LMConfig) -> TextTokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json` of a checkpoint.

        Raises CheckpointError when a file cannot be read, ConfigError when they contradict each other or `config`.
        """
        ranks = read_ranks(folder / "tiktoken.model")
        path = folder / "tokenizer_config.json"
        fields = read_fields(path) if path.exists() else Fields(str(path), {})
        names = _special_names(fields, len(ranks), config)
        return cls(ranks, names, SpecialTokens.resolve(names, config, fields.source))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all below `base`: special tokens are not recognised. Raises ParameterError on surrogates."""
        check_encodable(text)
        return [token for part in _slices(text) for token in self._coder.encode_ordinary(part)]

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id; a special id gives its name. Raises ParameterError when `token` is no text id."""
        if not 0 <= token < self.size:
            raise ParameterError(f"id {token} is not a text id; those are 0..{self.size - 1}")
        return self._coder.decode_single_token_bytes(token)

    def plain_bytes(self, token: int) -> bytes:
        """As `token_bytes`, but nothing for a special id."""
        data = self.token_bytes(token)
        return data if token < self.base else b""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`: bytes joined, U+FFFD for what is not UTF-8; special ids as their names or left out."""
        to_bytes = self.plain_bytes if skip_special else self.token_bytes
        return b"".join(map(to_bytes, ids)).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids as they are generated; a character whose bytes are still incomplete waits for the next id.

    The pieces that `push` and `finish` return join to exactly `TextTokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool = False) -> None:
        self._to_bytes = tokenizer.plain_bytes if skip_special else tokenizer.token_bytes
        self._tail = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, often one word, sometimes nothing."""
        return self._tail.decode(self._to_bytes(token))

    def finish(self) -> str:
        """What remains: U+FFFD for an incomplete character, else nothing. The decoder is then as new."""
        rest = self._tail.decode(b"", final=True)
        self._tail.reset()
        return rest
