"""The generation loop: one step is one position of both tracks.

Text leads: the audio track is blank for the first `delay` steps, the text track is blank after its end. What is fed
back is the forced id, and the same forced ids are the history of the repetition penalty. Per step the text is drawn
first, then the audio, each from a uniform number that depends on (track, step) only.

Notes
- What is not needed is not computed: in text mode the audio branch; after the end of the text, or when the text is
  given, the layers above the fork; during the delay the audio head (its layers run, they fill the cache). `plain`
  computes everything at every step; the ids are the same.
- An interrupted turn is continued by `replay`: logged ids go through the same one-position steps as when they were
  drawn, since a prefill's rows are not bit-equal to those of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kimia.errors import ParameterError
from kimia.model.cache import KVCache
from kimia.model.conversation import OutputType, check_output_type
from kimia.model.lm import DualTrackLM, Row, last_position, stack
from kimia.model.philox import Track, check_seed, uniform
from kimia.model.sampler import Sampling, TrackSampling, choose

StopReason: TypeAlias = Literal["text_eos", "audio_eod", "max_new_tokens"]
Uniforms: TypeAlias = Callable[[Track, int], float]  # (track, step) -> [0, 1)


@dataclass(frozen=True)
class TrackTokens:
    """The ids that steer the loop."""

    blank: int
    text_eos: int
    audio_ends: frozenset[int]  # msg_end and media_end
    token_offset: int  # id of audio code 0; text and special ids lie below
    vocabulary: int
    delay: int  # steps by which text leads audio


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is made. Raises ParameterError where options contradict each other."""

    output_type: OutputType
    max_steps: int  # 0 or less: no step
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0  # key of the uniform numbers
    uniforms: Uniforms | None = None  # in place of those of the seed
    forced_text: tuple[int, ...] | None = None  # say this: only the audio is drawn
    replay: tuple[tuple[int, int], ...] = ()  # logged (text id, audio id) of this turn's first steps
    plain: bool = False  # compute everything at every step

    def __post_init__(self) -> None:
        check_output_type(self.output_type)
        check_seed(self.seed)
        if self.forced_text is not None and self.output_type != "both":
            raise ParameterError("a text to say makes speech: output_type must be 'both'")
        if len(self.replay) > max(0, self.max_steps):
            raise ParameterError(f"{len(self.replay)} steps to replay exceed the budget of {self.max_steps}")


@dataclass(frozen=True)
class Step:
    """One position: what was fed back, and what had been drawn before blanks were forced."""

    index: int
    text_id: int
    audio_id: int
    raw_text: int | None  # None: not computed
    raw_audio: int | None
    replayed: bool  # already logged by the run that was interrupted
    stop: StopReason | None  # set on the last step


# ---- the rules of the tracks ------------------------------------------------------------------------------------


class TurnTracks:
    """The tracks of one turn so far and what its next step needs: pure bookkeeping, a state object of one row."""

    def __init__(self, tokens: TrackTokens, options: GenerateOptions) -> None:
        self.tokens = tokens
        self.options = options
        self.text: list[int] = []
        self.audio: list[int] = []
        self.text_ended = False
        self.stop: StopReason | None = None
        _check_forced_text(options.forced_text or (), tokens)

    @property
    def index(self) -> int:
        """The next step."""
        return len(self.text)

    @property
    def replaying(self) -> bool:
        """Whether the next step is a logged one."""
        return self.index < len(self.options.replay)

    @property
    def speaks(self) -> bool:
        """Whether the turn makes audio."""
        return self.options.output_type == "both"

    @property
    def draws_text(self) -> bool:
        """Whether text logits can still decide something, at the next step or later."""
        return not self.text_ended and self.options.forced_text is None

    @property
    def draws_audio(self) -> bool:
        """Whether audio logits decide the next step."""
        return self.speaks and self.index >= self.tokens.delay and not self.replaying

    def record(self, raw_text: int | None, raw_audio: int | None) -> Step:
        """Force blanks and ends onto what was drawn, append the step, and see whether it is the last."""
        if self.replaying:
            text_id, audio_id = self._logged()
        else:
            text_id, audio_id = self._text_id(raw_text), self._audio_id(raw_audio)
        replayed = self.replaying
        self.text.append(text_id)
        self.audio.append(audio_id)
        self.text_ended |= text_id == self.tokens.text_eos
        self.stop = self._stop(audio_id)
        if self.stop and self.replaying:
            raise ParameterError(f"the steps to replay go on after the turn has stopped at step {self.index - 1}")
        return Step(self.index - 1, text_id, audio_id, raw_text, raw_audio, replayed, self.stop)

    def _text_id(self, raw: int | None) -> int:
        if self.text_ended:
            return self.tokens.blank
        forced = self.options.forced_text
        if forced is not None:
            return forced[self.index] if self.index < len(forced) else self.tokens.text_eos
        return _computed(raw)

    def _audio_id(self, raw: int | None) -> int:
        return _computed(raw) if self.draws_audio else self.tokens.blank

    def _logged(self) -> tuple[int, int]:
        text_id, audio_id = self.options.replay[self.index]
        if not self.draws_text and text_id != self._text_id(None):
            raise ParameterError(f"replayed step {self.index} has text id {text_id}, not the {self._text_id(None)} due")
        if (self.index < self.tokens.delay or not self.speaks) and audio_id != self.tokens.blank:
            raise ParameterError(f"replayed step {self.index} has audio id {audio_id} where the audio track is blank")
        if not (0 <= text_id < self.tokens.vocabulary and 0 <= audio_id < self.tokens.vocabulary):
            raise ParameterError(f"replayed step {self.index} has an id outside the vocabulary")
        return text_id, audio_id

    def _stop(self, audio_id: int) -> StopReason | None:
        if audio_id in self.tokens.audio_ends:
            return "audio_eod"
        if not self.speaks and self.text_ended:
            return "text_eos"
        return "max_new_tokens" if self.index >= self.options.max_steps else None


def _computed(raw: int | None) -> int:
    if raw is None:
        raise RuntimeError("this step's id was skipped but decides the track")
    return raw


def _check_forced_text(ids: Sequence[int], tokens: TrackTokens) -> None:
    for number, token in enumerate(ids):
        if not 0 <= token < tokens.token_offset or token == tokens.text_eos:
            raise ParameterError(f"id {token} at position {number} of the text to say is no text id")


# ---- the loop ---------------------------------------------------------------------------------------------------


def generate(lm: DualTrackLM, prompt: Row, tokens: TrackTokens, options: GenerateOptions) -> Iterator[Step]:
    """Answer a prompt step by step; the first step costs the prefill. The last one carries the reason of the stop.

    Raises ParameterError for speech from a model without its audio branch, for an illegal text to say or replay;
    AudioError when the prompt's continuous features do not fit it; NumericsError.
    """
    if options.output_type == "both" and lm.text_only:
        raise ParameterError("the model was loaded for text only; load it with its audio branch to make speech")
    tracks = TurnTracks(tokens, options)
    uniforms = options.uniforms or partial(uniform, options.seed)
    cache = lm.new_cache(rows=1)
    feed = prompt
    while tracks.stop is None and tracks.index < options.max_steps:
        text_logits, audio_logits = _logits(lm, feed, cache, tracks)
        raw_text = _draw(text_logits, Track.TEXT, tracks, uniforms)
        raw_audio = _draw(audio_logits, Track.AUDIO, tracks, uniforms)
        step = tracks.record(raw_text, raw_audio)
        yield step
        feed = Row((step.audio_id,), (step.text_id,))


@torch.inference_mode()
def _logits(lm: DualTrackLM, feed: Row, cache: KVCache, tracks: TurnTracks) -> tuple[Tensor | None, Tensor | None]:
    """Last position's text and audio logits, (1, V) each, or None where the next step does not need them."""
    plain = tracks.options.plain
    batch = stack([feed], lm.device)
    extent = lm.extent(batch.counts, cache)
    hidden = lm.trunk(lm.embed(batch), extent)  # (1, T, H)
    text_logits = audio_logits = None
    if tracks.draws_text or plain:
        text_hidden = lm.text_branch(hidden, extent)
        if plain or not tracks.replaying:
            text_logits = lm.lm_head(last_position(text_hidden, extent))
    if tracks.speaks or (plain and not lm.text_only):
        audio_hidden = lm.audio_branch(hidden, extent)
        if plain or tracks.draws_audio:
            audio_logits = lm.mimo_output(last_position(audio_hidden, extent))
    return text_logits, audio_logits


@torch.inference_mode()
def _draw(logits: Tensor | None, track: Track, tracks: TurnTracks, uniforms: Uniforms) -> int | None:
    if logits is None:
        return None
    text = track is Track.TEXT
    sampling: TrackSampling = tracks.options.sampling.text if text else tracks.options.sampling.audio
    number = 0.0 if sampling.greedy else uniforms(track, tracks.index)
    return choose(logits, [sampling], [tracks.text if text else tracks.audio], [number])[0]


# ---- what came of it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A finished answer."""

    text_stream: tuple[int, ...]  # as fed back, blanks included
    audio_stream: tuple[int, ...]
    returned_text: tuple[int, ...]  # up to the end of the text, which is left out
    returned_audio: tuple[int, ...]  # from the delay on; the audio end is included
    text_ids: tuple[int, ...]  # returned text less illegal ids
    audio_codes: tuple[int, ...]  # returned audio less illegal ids, token offset taken off
    illegal_text: int  # audio codes drawn in the text track
    illegal_audio: int  # ids in the audio track that are neither a code nor an end
    stop: StopReason | None  # None: the budget allowed no step, or the run was interrupted


def collect(steps: Iterable[Step], tokens: TrackTokens, output_type: OutputType) -> Result:
    """Sum up the steps of an answer."""
    run = list(steps)
    text_stream = tuple(step.text_id for step in run)
    audio_stream = tuple(step.audio_id for step in run)
    ended = text_stream.index(tokens.text_eos) if tokens.text_eos in text_stream else len(text_stream)
    returned_text = text_stream[:ended]
    returned_audio = audio_stream[tokens.delay :] if output_type == "both" else ()
    return Result(
        text_stream=text_stream,
        audio_stream=audio_stream,
        returned_text=returned_text,
        returned_audio=returned_audio,
        text_ids=tuple(token for token in returned_text if token < tokens.token_offset),
        audio_codes=tuple(token - tokens.token_offset for token in returned_audio if token >= tokens.token_offset),
        illegal_text=sum(token >= tokens.token_offset for token in returned_text),
        illegal_audio=sum(token < tokens.token_offset and token not in tokens.audio_ends for token in returned_audio),
        stop=run[-1].stop if run else None,
    )
