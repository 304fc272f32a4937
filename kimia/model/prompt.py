"""The prompt: a checked conversation laid out as two parallel streams of ids, one for audio and one for text.

With D the audio delay, n codes, B the blank and every control symbol in the audio stream (except the end of text):

    role start     audio: start of user or assistant              text: B         once per turn
    text           audio: B ...                                   text: ids       the assistant's ends with text_eos
    audio          audio: media_begin codes media_end             text: B ...     codes take continuous features
    audio-text     audio: B x D, codes                            text: ids, B ...  the assistant's spoken history
    turn end       audio: (ct or ctd after a clip,) msg_end       text: B         once per turn

Notes
- A turn is a run of messages of one role. Only a turn whose last message is `audio` says what is wanted (ct: text, ctd:
  text and speech); after text the prompt is the same for both, as in the release.
- Generated answers carry a text_eos and an audio end that spoken history lacks; the release was trained so.
- Continuous features need as many rows as there are codes; surplus rows are cut.
- Each stretch of positions is kept as a `Span`, from which segments, masks and the table of `kimia explain` follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch

from kimia.errors import ContextLengthError, ConversationError, ParameterError
from kimia.model.config import LMConfig
from kimia.model.conversation import Message, OutputType, Role, check_output_type
from kimia.model.text import TextTokenizer

Part: TypeAlias = Literal[
    "role start", "text", "text end", "media begin", "codes", "media end", "wanted output", "spoken", "turn end"
]
BudgetRule: TypeAlias = Literal["context", "upstream"]

TOKEN_RATE = 12.5  # Hz, steps of the language model and frames of either audio encoder
SPEECH_STEPS = int(120 * TOKEN_RATE)  # longest spoken answer, 120 s
UPSTREAM_STEPS = {"both": SPEECH_STEPS, "text": int(600 * TOKEN_RATE)}  # prompt and answer together


class Encoded(Protocol):
    """A clip as the encoders give it."""

    @property
    def codes(self) -> tuple[int, ...]:
        """Semantic tokens without the token offset, 12.5 Hz."""

    @property
    def features(self) -> torch.Tensor | None:
        """Continuous features (frames, kimia_adaptor_input_dim), 12.5 Hz; None to lay out codes alone."""


@dataclass(frozen=True)
class Span:
    """A stretch of positions with one purpose."""

    part: Part
    role: Role
    message: int | None  # index of the message; None for the start of the answer
    begin: int
    length: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """Two streams of T ids and what belongs to them. Immutable, compared by identity."""

    audio_ids: tuple[int, ...]
    text_ids: tuple[int, ...]
    spans: tuple[Span, ...]  # cover the positions 0..T-1 in order
    features: tuple[torch.Tensor, ...] | None  # (codes, F) of each segment; None: no segments, or none given

    def __len__(self) -> int:
        return len(self.audio_ids)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(begin, length) of each stretch of codes that takes continuous features, in order."""
        return tuple((span.begin, span.length) for span in self.spans if span.part == "codes")

    @property
    def is_continuous(self) -> tuple[bool, ...]:
        """Per position: does it take a continuous feature?"""
        return tuple(span.part == "codes" for span in self.spans for _ in range(span.length))


def build_prompt(
    messages: Sequence[Message],
    encoded: Mapping[int, Encoded],
    output_type: OutputType,
    config: LMConfig,
    tokenizer: TextTokenizer,
    add_assistant_start: bool = True,
) -> Prompt:
    """Lay out a conversation; `encoded` holds the clips by index of their message.

    A clip is looked up where a message needs codes or features (see Message); with features None for all clips only
    ids are laid out. Training examples, which end with the assistant, go without `add_assistant_start`.

    Raises ConversationError, naming the message, when a transcript is longer than its audio, a clip is missing or
    does not fit the model; ParameterError for another output type.
    """
    check_output_type(output_type)
    layout = _Layout(encoded, output_type, config, tokenizer)
    writer = _Writer()
    for index, message in enumerate(messages):
        begins = index == 0 or messages[index - 1].role != message.role
        ends = index + 1 == len(messages) or messages[index + 1].role != message.role
        if begins:
            writer.write(message.role, index, layout.role_start(message.role))
        for piece in layout.message(index, message):
            writer.write(message.role, index, piece)
        if ends:
            for piece in layout.turn_end(message):
                writer.write(message.role, index, piece)
    if add_assistant_start:
        writer.write("assistant", None, layout.role_start("assistant"))
    return Prompt(tuple(writer.audio), tuple(writer.text), tuple(writer.spans), layout.features(messages))


def loss_masks(prompt: Prompt) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Per position: is its (audio id, text id) a training target?

    Targets are what the assistant says: its text with the end of text, and the codes of its `audio` messages with
    media_end. Spoken history is context only. Masks are not shifted: position t stands for the id at t.
    """
    return _assistant_mask(prompt, ("codes", "media end")), _assistant_mask(prompt, ("text", "text end"))


def _assistant_mask(prompt: Prompt, parts: tuple[Part, ...]) -> tuple[bool, ...]:
    return tuple(span.role == "assistant" and span.part in parts for span in prompt.spans for _ in range(span.length))


def steps_allowed(
    prompt_length: int,
    output_type: OutputType,
    max_new_tokens: int | None,
    config: LMConfig,
    rule: BudgetRule = "context",
) -> int:
    """How many steps the answer may take; None or -1 for `max_new_tokens` sets no limit of the caller's own.

    - context: prompt and answer fit `max_position_embeddings`, speech lasts at most 120 s after its delay. Raises
      ContextLengthError when no position is left.
    - upstream: the release's rule, for comparison. With speech, prompt and answer share 1500 steps whatever the
      caller says; for text the caller's value or what is left of 7500. May be 0: the answer is then empty.

    Raises ParameterError for a `max_new_tokens` that is neither positive nor None or -1, and for another rule.
    """
    check_output_type(output_type)
    caller = caller_limit(max_new_tokens)
    if rule == "upstream":
        if output_type == "text" and caller is not None:
            return caller
        return max(0, UPSTREAM_STEPS[output_type] - prompt_length)
    if rule != "context":
        raise ParameterError(f"the budget rule must be 'context' or 'upstream', got {rule!r}")
    left = config.max_positions - prompt_length
    if left < 1:
        raise ContextLengthError(
            f"the prompt takes {prompt_length} positions and the model has {config.max_positions}, so no room is left "
            "for an answer; drop earlier turns or shorten the audio (12.5 positions per second)"
        )
    limits = [left]
    if output_type == "both":
        limits.append(config.audio_delay + SPEECH_STEPS)
    if caller is not None:
        limits.append(caller)
    return min(limits)


def caller_limit(max_new_tokens: int | None) -> int | None:
    """The most steps that a caller wants, None for no limit. Raises ParameterError unless positive, None or -1."""
    if max_new_tokens is None or (max_new_tokens == -1 and not isinstance(max_new_tokens, bool)):
        return None
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ParameterError(f"max_new_tokens must be a positive integer, or -1 for no limit, got {max_new_tokens!r}")
    return max_new_tokens


@dataclass(frozen=True)
class _Piece:
    """A stretch of both streams before it has a place."""

    part: Part
    audio: Sequence[int]
    text: Sequence[int]


class _Writer:
    """Appends pieces to both streams and keeps their spans."""

    def __init__(self) -> None:
        self.audio: list[int] = []
        self.text: list[int] = []
        self.spans: list[Span] = []

    def write(self, role: Role, message: int | None, piece: _Piece) -> None:
        self.spans.append(Span(piece.part, role, message, len(self.audio), len(piece.audio)))
        self.audio.extend(piece.audio)
        self.text.extend(piece.text)


class _Layout:
    """What each message becomes."""

    def __init__(
        self, encoded: Mapping[int, Encoded], output_type: OutputType, config: LMConfig, tokenizer: TextTokenizer
    ) -> None:
        self.encoded = encoded
        self.config = config
        self.tokenizer = tokenizer
        self.tokens = tokenizer.special
        self.wanted = self.tokens.ct if output_type == "text" else self.tokens.ctd

    def role_start(self, role: Role) -> _Piece:
        return self._control("role start", self.tokens.user_start if role == "user" else self.tokens.assistant_start)

    def turn_end(self, last: Message) -> list[_Piece]:
        end = self._control("turn end", self.tokens.msg_end)
        return [self._control("wanted output", self.wanted), end] if last.message_type == "audio" else [end]

    def message(self, index: int, message: Message) -> list[_Piece]:
        if message.message_type == "text":
            return self._text(message)
        codes = self._codes(index, message)
        if message.message_type == "audio":
            return self._audio(codes)
        return [self._spoken(index, codes, self._text_ids(message))]

    def features(self, messages: Sequence[Message]) -> tuple[torch.Tensor, ...] | None:
        """Continuous features of all segments, each (codes, F), or None when there are no segments or no features."""
        segments = [index for index, message in enumerate(messages) if message.needs_features]
        rows = [self._features(index, messages[index]) for index in segments]
        given = [row for row in rows if row is not None]
        if not given:
            return None
        if len(given) < len(rows):
            lacking = next(index for index, row in zip(segments, rows, strict=True) if row is None)
            raise ConversationError("has no continuous features although other audio messages have", lacking)
        return tuple(given)

    def _control(self, part: Part, token: int) -> _Piece:
        return _Piece(part, (token,), (self.tokens.blank,))

    def _blanks(self, count: int) -> list[int]:
        return [self.tokens.blank] * count

    def _text(self, message: Message) -> list[_Piece]:
        ids = self._text_ids(message)
        pieces = [_Piece("text", self._blanks(len(ids)), ids)]
        if message.role == "assistant":
            pieces.append(_Piece("text end", self._blanks(1), (self.tokens.text_eos,)))
        return pieces

    def _audio(self, codes: Sequence[int]) -> list[_Piece]:
        return [
            self._control("media begin", self.tokens.media_begin),
            _Piece("codes", codes, self._blanks(len(codes))),
            self._control("media end", self.tokens.media_end),
        ]

    def _spoken(self, index: int, codes: Sequence[int], ids: Sequence[int]) -> _Piece:
        delay = self.config.audio_delay
        padding = delay + len(codes) - len(ids)
        if padding < 0:
            raise ConversationError(
                f"the transcript has {len(ids)} tokens, its audio only {len(codes)} codes after a delay of {delay}; "
                "does the transcript belong to this audio?",
                index,
            )
        return _Piece("spoken", [*self._blanks(delay), *codes], [*ids, *self._blanks(padding)])

    def _text_ids(self, message: Message) -> Sequence[int]:
        if message.text_tokens is not None:
            return message.text_tokens
        return self.tokenizer.encode(message.text or "")

    def _clip(self, index: int) -> Encoded:
        if index not in self.encoded:
            raise ConversationError("its audio has not been encoded", index)
        return self.encoded[index]

    def _codes(self, index: int, message: Message) -> Sequence[int]:
        """Audio ids, token offset included."""
        if message.audio_tokens is not None:
            return message.audio_tokens
        codes = self._clip(index).codes
        illegal = [code for code in codes if not 0 <= code < self.config.audio_codes]
        if illegal:
            raise ConversationError(
                f"its audio has code {illegal[0]}, the language model knows 0..{self.config.audio_codes - 1}; "
                "do the tokenizer and the model belong together?",
                index,
            )
        if not codes and message.message_type == "audio":
            raise ConversationError("its audio is too short: not one code", index)
        return [self.config.token_offset + code for code in codes]

    def _features(self, index: int, message: Message) -> torch.Tensor | None:
        """Features of one segment cut to its codes, (codes, F)."""
        features = self._clip(index).features
        if features is None:
            return None
        wanted = len(self._codes(index, message))
        width = self.config.adaptor_input_dim
        if features.ndim != 2 or features.shape[1] != width or len(features) < wanted:
            raise ConversationError(
                f"continuous features of shape {tuple(features.shape)} do not fit {wanted} codes and width {width}",
                index,
            )
        return features[:wanted]
