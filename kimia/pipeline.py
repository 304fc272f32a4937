"""The three models in a row, in one process: a conversation in, text and speech out.

This is the plain twin of the distributed pipeline and the oracle for everything built on the model:

    from kimia.pipeline import KimiAudio

    model = KimiAudio("path/or/hub-id", load_detokenizer=True)
    wav, text = model.generate([{"role": "user", "message_type": "audio", "content": "question.wav"}],
                               output_type="both", audio_temperature=0.8, audio_top_k=10, seed=7)

`generate` has upstream's arguments and result, so that its scripts port by changing the import; `stream` gives text and
audio while the language model still generates; `say` speaks a given text. Nothing here is shared between turns but
weights, so turns may be interleaved.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from kimia.errors import AudioError, ContextLengthError, ParameterError
from kimia.model.audio import load_audio, prepare_waveform
from kimia.model.checkpoint import open_checkpoint
from kimia.model.chunking import ChunkPlanner, Push
from kimia.model.config import LMConfig
from kimia.model.consistency import read_configs
from kimia.model.conversation import AudioSource, Message, OutputType, check_output_type, parse_conversation
from kimia.model.detokenize import Detokenizer, Synthesis
from kimia.model.encode import AudioEncoder
from kimia.model.generate import GenerateOptions, Result, Step, StopReason, TrackTokens, collect, generate
from kimia.model.lm import Row, load_lm
from kimia.model.philox import SEED_LIMIT, check_seed
from kimia.model.preset_file import PRESET_SUFFIX, PresetFile, files_of
from kimia.model.presets import LOW_LATENCY, UPSTREAM, Preset, find_preset, preset_of
from kimia.model.prompt import UPSTREAM_STEPS, Encoded, Prompt, build_prompt, caller_limit, steps_allowed
from kimia.model.sampler import Sampling
from kimia.model.text import StreamDecoder, TextTokenizer

Chat = Sequence[Mapping[str, Any]]


class Options(TypedDict, total=False):
    """Keyword arguments of a turn, with upstream's names and defaults."""

    text_temperature: float
    text_top_k: int
    text_repetition_penalty: float
    text_repetition_window_size: int
    audio_temperature: float
    audio_top_k: int
    audio_repetition_penalty: float
    audio_repetition_window_size: int
    max_new_tokens: int | None  # steps of the answer, 12.5 per second of speech; -1 or None: no limit of the caller's
    seed: int | None  # repeats the turn exactly; drawn when None
    preset: str  # "upstream", "low-latency", one of the checkpoint's or a file: chunk schedule, cross-fade and budget


# ---- what a turn yields -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextDelta:
    """Characters that one step of the text track completed."""

    text: str
    step: int


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """A piece of speech; pieces follow one another without gap or overlap."""

    index: int
    pcm: np.ndarray  # (samples,) float32 at KimiAudio.sample_rate


@dataclass(frozen=True)
class TurnDone:
    """The end of a turn: all its ids, and what they cost."""

    text: str
    result: Result
    seed: int
    prompt_positions: int
    tokens: TrackTokens = field(repr=False)

    @property
    def stop(self) -> StopReason | None:
        """Why the turn ended; None when the budget allowed no step."""
        return self.result.stop

    @property
    def steps(self) -> int:
        """Steps that the language model took."""
        return len(self.result.text_stream)

    def message(self, heard: int | None = None) -> dict[str, Any]:
        """The answer as a message of the next turn's chat: by its ids, so it is never encoded again.

        `heard` keeps only the first codes (80 ms each) and the text of the steps that had led to them, for a caller
        who interrupted. An answer without speech gives a text message. Raises ParameterError for a negative number.
        """
        if heard is not None and heard < 0:
            raise ParameterError(f"heard counts codes from the beginning, got {heard}")
        if not self.result.returned_audio:
            return {
                "role": "assistant",
                "message_type": "text",
                "content": self.text,
                "text_tokens": list(self.result.text_ids),
            }
        codes = self.result.audio_codes[:heard]
        led = self.result.returned_text[: self.tokens.delay + len(codes)]
        return {
            "role": "assistant",
            "message_type": "audio-text",
            "audio_tokens": [self.tokens.token_offset + code for code in codes],
            "text_tokens": [token for token in led if token < self.tokens.token_offset],
        }


Event = TextDelta | AudioChunk | TurnDone


# ---- from a conversation to a prompt ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CodesOnly:
    """A clip whose continuous features nobody reads: spoken history, or a prompt that is only looked at."""

    codes: tuple[int, ...]
    features: None = None


def load_clip(source: AudioSource, rate: int) -> np.ndarray:
    """A message's audio as a mono waveform (samples,) at `rate` Hz. Raises AudioError."""
    if isinstance(source, tuple):
        return prepare_waveform(source[0], source[1], rate)
    return load_audio(source, rate)


def load_clips(messages: Sequence[Message], rate: int) -> dict[int, np.ndarray]:
    """The waveforms that a prompt needs, by index of their message. Raises AudioError that names the message."""
    waves = {}
    for index, message in enumerate(messages):
        if message.audio is not None and (message.needs_features or message.needs_codes):
            try:
                waves[index] = load_clip(message.audio, rate)
            except AudioError as error:
                raise AudioError(f"message {index}: {error}") from error
    return waves


def blank_clips(waves: Mapping[int, np.ndarray], samples_per_position: int) -> dict[int, Encoded]:
    """Clips of the right length but without content: enough to lay out a prompt and check it before any compute."""
    return {index: CodesOnly((0,) * -(-len(wave) // samples_per_position)) for index, wave in waves.items()}


def encode_clips(
    messages: Sequence[Message], waves: Mapping[int, np.ndarray], encoder: AudioEncoder
) -> dict[int, Encoded]:
    """Encode waveforms, by index of their message: continuous features only where they are read."""
    heard = [index for index in waves if messages[index].needs_features]
    spoken = [index for index in waves if not messages[index].needs_features]
    encoded: dict[int, Encoded] = dict(zip(heard, encoder.encode([waves[i] for i in heard]), strict=True))
    for index, codes in zip(spoken, encoder.codes([waves[i] for i in spoken]), strict=True):
        encoded[index] = CodesOnly(codes)
    return encoded


# ---- the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """A prepared turn: everything is checked, nothing is computed yet."""

    prompt: Prompt
    preset: Preset
    options: GenerateOptions


class KimiAudio:
    """All stages of one checkpoint.

    `load_detokenizer=False` never opens the detokenizer's files: answers are text. `text_only` also leaves the language
    model's audio branch out (about a quarter of its memory). Without `device` and `dtype`: bfloat16 on CUDA where there
    is one, else float32 on the CPU. `quantize` ("int8", "fp8") quantises the language model's matrices. Raises
    CheckpointError, ParameterError.
    """

    def __init__(  # noqa: PLR0913  # upstream's two; the rest, by name, says what is loaded and how
        self,
        model_path: str | Path,
        load_detokenizer: bool = True,
        *,
        text_only: bool = False,
        vq_tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        speaks = load_detokenizer and not text_only
        checkpoint = open_checkpoint(model_path, vq_tokenizer, detokenizer=speaks)
        own = (PresetFile.read(path) for path in files_of(checkpoint.root))
        self.presets = {file.schedule.name: preset_of(file) for file in own}  # of the checkpoint itself
        self.config: LMConfig = read_configs(checkpoint, detokenizer=speaks).lm
        self.tokenizer = TextTokenizer.load(checkpoint.root, self.config)
        self.encoder = AudioEncoder.load(checkpoint, self.config.adaptor_input_dim, self.device, self.dtype)
        self.lm = load_lm(checkpoint.root, device=self.device, dtype=self.dtype, text_only=text_only, quantize=quantize)
        self.detokenizer = Detokenizer.load(checkpoint, self.device, self.dtype) if speaks else None
        self.track_tokens = track_tokens(self.config, self.tokenizer)

    @property
    def sample_rate(self) -> int:
        """Of the speech that comes out, Hz."""
        return self._speaker().sample_rate

    def generate(
        self, chats: Chat, output_type: OutputType = "text", **options: Unpack[Options]
    ) -> tuple[torch.Tensor | None, str]:
        """Answer a conversation: (waveform (1, samples) float32 on the CPU, text).

        The waveform is None for output_type "text" or without a detokenizer, and empty when no legal code came.
        Default preset: upstream. Raises ConversationError, AudioError, ParameterError.
        """
        turn = self._prepare(chats, output_type, {"preset": UPSTREAM.name, **options})
        done, pcm = _gathered(self._events(turn, self._synthesis(turn)))
        return pcm if output_type == "both" and self.detokenizer else None, done.text

    def stream(self, chats: Chat, output_type: OutputType = "both", **options: Unpack[Options]) -> Iterator[Event]:
        """Answer a conversation piece by piece; the last event is TurnDone.

        Everything is checked and the audio is encoded before this returns. Default preset: low-latency.
        Raises as `generate` does.
        """
        turn = self._prepare(chats, output_type, {"preset": LOW_LATENCY.name, **options})
        return self._events(turn, self._synthesis(turn))

    def say(self, text: str, chats: Chat = (), **options: Unpack[Options]) -> torch.Tensor:
        """Speak a given text: waveform (1, samples) float32 on the CPU. Only the audio is sampled.

        `chats` is what was said before, if anything. Default preset: upstream.
        """
        self._speaker()
        if not isinstance(text, str):
            raise ParameterError(f"the text to say must be a string, got {type(text).__name__}")
        ids = tuple(self.tokenizer.encode(text))
        if not ids:
            raise ParameterError("there is nothing to say: the text is empty")
        turn = self._prepare(chats, "both", {"preset": UPSTREAM.name, **options}, ids)
        return _gathered(self._events(turn, self._synthesis(turn)))[1]

    # ---- one turn ----

    def _prepare(
        self, chats: Chat, output_type: OutputType, options: Options, say: tuple[int, ...] | None = None
    ) -> _Turn:
        """Check everything, and only then encode the audio."""
        check_output_type(output_type)
        if output_type == "both" and self.lm.text_only:
            raise ParameterError("the model was loaded for text only; load it without text_only to get speech")
        preset, seed, limit, sampling = _read(options, self.presets)
        messages = () if say is not None and not chats else parse_conversation(chats, self.config)
        waves = load_clips(messages, self.encoder.sample_rate)
        blank = self._prompt(messages, blank_clips(waves, self.encoder.samples_per_position), output_type)
        steps = answer_steps(blank, output_type, limit, self.config, preset)
        if say is not None and len(say) >= steps:
            raise ParameterError(f"the text to say has {len(say)} tokens and the answer only {steps} steps; shorten it")
        turn_options = GenerateOptions(output_type, steps, sampling, seed, forced_text=say)
        prompt = self._prompt(messages, encode_clips(messages, waves, self.encoder), output_type)
        return _Turn(prompt, preset, turn_options)

    def _prompt(self, messages: Sequence[Message], clips: Mapping[int, Encoded], output_type: OutputType) -> Prompt:
        return build_prompt(messages, clips, output_type, self.config, self.tokenizer)

    def _synthesis(self, turn: _Turn) -> Synthesis | None:
        if self.detokenizer is None or turn.options.output_type == "text":
            return None
        return self.detokenizer.stream(turn.preset, turn.options.seed)

    def _events(self, turn: _Turn, synthesis: Synthesis | None) -> Iterator[Event]:
        """Generate, and synthesise each chunk as soon as its last code is there."""
        steps: list[Step] = []
        text = TextTrack(self.tokenizer, self.track_tokens, keep_special=turn.preset is UPSTREAM)
        speech = _Speech(synthesis, turn.preset, self.track_tokens)
        for step in generate(self.lm, prompt_row(turn.prompt), self.track_tokens, turn.options):
            steps.append(step)
            yield from text.feed(step)
            yield from speech.feed(step)
        yield from text.finish(len(steps))
        yield from speech.finish()
        result = collect(steps, self.track_tokens, turn.options.output_type)
        yield TurnDone("".join(text.pieces), result, turn.options.seed, len(turn.prompt), self.track_tokens)

    def _speaker(self) -> Detokenizer:
        if self.detokenizer is None:
            raise ParameterError("the detokenizer was not loaded; use load_detokenizer=True to get speech")
        return self.detokenizer


class TextTrack:
    """Steps in, text out, up to the end of the text track; audio codes drawn in it are left out."""

    def __init__(self, tokenizer: TextTokenizer, tokens: TrackTokens, *, keep_special: bool) -> None:
        self.decoder = StreamDecoder(tokenizer, skip_special=not keep_special)
        self.tokens = tokens
        self.pieces: list[str] = []
        self.ended = False

    def feed(self, step: Step) -> Iterator[TextDelta]:
        """The characters that this step completes, if any."""
        self.ended |= step.text_id == self.tokens.text_eos
        if not self.ended and step.text_id < self.tokens.token_offset:
            yield from self._delta(self.decoder.push(step.text_id), step.index)

    def finish(self, steps: int) -> Iterator[TextDelta]:
        """What an unfinished character leaves."""
        yield from self._delta(self.decoder.finish(), steps - 1)

    def _delta(self, piece: str, step: int) -> Iterator[TextDelta]:
        if piece:
            self.pieces.append(piece)
            yield TextDelta(piece, step)


class _Speech:
    """Steps in, audio chunks out; silent without a synthesis. Ids that are no code are left out."""

    def __init__(self, synthesis: Synthesis | None, preset: Preset, tokens: TrackTokens) -> None:
        self.synthesis = synthesis
        self.tokens = tokens
        self.planner = ChunkPlanner(preset)
        self.chunks = 0

    def feed(self, step: Step) -> Iterator[AudioChunk]:
        """The chunk that this step completes, if any."""
        if step.audio_id >= self.tokens.token_offset:
            yield from self._pushed(self.planner.feed(step.audio_id - self.tokens.token_offset))

    def finish(self) -> Iterator[AudioChunk]:
        """Everything that was held back."""
        yield from self._pushed(self.planner.finish())

    def _pushed(self, push: Push | None) -> Iterator[AudioChunk]:
        if self.synthesis is None or push is None:
            return
        pcm = self.synthesis.push(push.tokens, push.final)
        if len(pcm):
            yield AudioChunk(self.chunks, pcm.numpy())
            self.chunks += 1


# ---- small parts ------------------------------------------------------------------------------------------------


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was named, else CUDA where there is one, else the CPU. Raises ParameterError."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"{device!r} is not a device; use cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise ParameterError(f"device {chosen} is not supported; use cpu, cuda or cuda:N")
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device {chosen} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "use cpu, or install torch for CUDA"
        )
    return chosen


def choose_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that was asked for, else bfloat16 on CUDA and float32 on the CPU. Raises ParameterError."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ParameterError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    return dtype


def track_tokens(config: LMConfig, tokenizer: TextTokenizer) -> TrackTokens:
    """The ids that steer the generation loop."""
    special = tokenizer.special
    return TrackTokens(
        blank=special.blank,
        text_eos=special.text_eos,
        audio_ends=frozenset((special.msg_end, special.media_end)),
        token_offset=config.token_offset,
        vocabulary=config.vocab_size,
        delay=config.audio_delay,
    )


def prompt_row(prompt: Prompt) -> Row:
    """A prompt as the language model reads it."""
    return Row(prompt.audio_ids, prompt.text_ids, prompt.segments, prompt.features)


def answer_steps(
    prompt: Prompt, output_type: OutputType, max_new_tokens: int | None, config: LMConfig, preset: Preset
) -> int:
    """Steps that an answer may take: what the context and the caller allow, in upstream's preset also by its rule.

    Raises ContextLengthError, naming the message that does not fit, when there is no room for an answer.
    """
    try:
        steps = steps_allowed(len(prompt), output_type, max_new_tokens, config)
    except ContextLengthError as error:
        raise ContextLengthError(error.rule, _message_at(prompt, config.max_positions - 1)) from error
    if preset is not UPSTREAM:
        return steps
    allowed = steps_allowed(len(prompt), output_type, max_new_tokens, config, "upstream")
    if allowed < 1:
        limit = UPSTREAM_STEPS[output_type]
        raise ContextLengthError(
            f"the prompt takes {len(prompt)} positions and the preset upstream ends prompt and answer at {limit}; "
            f"use the preset {LOW_LATENCY.name}, or shorten the conversation",
            _message_at(prompt, limit - 1),
        )
    return min(steps, allowed)


def _message_at(prompt: Prompt, position: int) -> int | None:
    """The message that a position belongs to; None for the start of the answer."""
    return next((span.message for span in prompt.spans if span.begin + span.length > position), None)


def _preset(name: str, own: Mapping[str, Preset]) -> Preset:
    """A preset by its name, or that of a file."""
    if name in own:
        return own[name]
    return preset_of(PresetFile.read(Path(name))) if name.endswith(PRESET_SUFFIX) else find_preset(name)


def _read(options: Options, own: Mapping[str, Preset]) -> tuple[Preset, int, int | None, Sampling]:
    """Preset, seed, limit and sampling of a turn; unknown names are refused with the list of the known ones."""
    rest: dict[str, Any] = dict(options)
    preset = _preset(rest.pop("preset", UPSTREAM.name), own)
    seed, limit = (_integer(name, rest.pop(name, None)) for name in ("seed", "max_new_tokens"))
    sampling = Sampling.from_arguments(rest)
    return preset, secrets.randbelow(SEED_LIMIT) if seed is None else check_seed(seed), caller_limit(limit), sampling


def check_options(**options: Unpack[Options]) -> None:
    """Raise ParameterError for a seed, a limit or a sampling setting that no model takes, before one is loaded.

    A preset is not looked at: a checkpoint may bring its own.
    """
    _read({**options, "preset": UPSTREAM.name}, {})


def _integer(name: str, value: Any) -> int | None:
    """A plain int from any integer (NumPy's, say); None stays None."""
    if value is None:
        return None
    try:
        return operator.index(value)
    except TypeError as error:
        raise ParameterError(f"{name} must be an integer, got {value!r}") from error


def _gathered(events: Iterator[Event]) -> tuple[TurnDone, torch.Tensor]:
    """The end of a turn and all its audio, (1, samples)."""
    pieces = [np.zeros(0, np.float32)]
    for event in events:
        if isinstance(event, AudioChunk):
            pieces.append(event.pcm)
        elif isinstance(event, TurnDone):
            return event, torch.from_numpy(np.concatenate(pieces))[None]
    raise RuntimeError("a turn ended without TurnDone")
