"""Many answers at once: the fast twin of `kimia.model.generate`, one step of every answer at a time.

    engine = Engine(lm, rows=16)
    answer = engine.begin(prompt, tokens, options)
    while answer.waits_for_prefill:
        engine.prefill(answer)                  # one piece of the prompt
    step, = engine.step([answer])               # a Step, or the error that ended the answer

The rules of the tracks are those of the twin (`TurnTracks`). Nothing depends on the company: the prompt is read turn by
turn in pieces that begin at the same positions always; its last position and every step after it, replayed ones too,
go through the decode step of `kimia.model.fused` at the full number of rows. An answer is therefore the same, bit by
bit, alone and among others, in one go and taken up again. From the twin it differs by rounding.

An answer of a named conversation begins with the KV that the conversation's last one has left (`kimia.model.prefix`):

    engine.keep(answer, spoken)                 # when it has ended: what follows the prompt in the history
    while engine.read_ahead(conversation):      # in idle time
        pass
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kimia.errors import ConfigError, KimiaError, ParameterError
from kimia.model.cache import GrowingCache
from kimia.model.drawing import Draws, Recent
from kimia.model.fused import FusedLM, RowFeed, Wanted
from kimia.model.generate import GenerateOptions, Step, TrackTokens, TurnTracks
from kimia.model.lm import DualTrackLM, Row, stack
from kimia.model.paged import PagedLM
from kimia.model.philox import Track, uniforms
from kimia.model.prefix import Ahead, PieceContent, Prefix, Prefixes, content_of
from kimia.model.sampler import TrackSampling, no_numbers

TRACKS = Track.TEXT, Track.AUDIO  # in the order of the logits
NUMBERS = 256  # steps whose uniform numbers are made at once: ten times cheaper than one by one
LANES = 32  # numbers that a CPU loop takes at a time, at most; it computes the rest of a row in another way
PIECE = {"cpu": 64, "cuda": 512}  # positions of the prompt that are read at a time: about one step's time


class Answer:
    """One turn in the engine: its prompt, its tracks and its cache. A state object; it belongs to no row."""

    def __init__(self, prompt: Row, tokens: TrackTokens, options: GenerateOptions, prefix: Prefix) -> None:
        self.prompt = prompt
        self.tracks = TurnTracks(tokens, options)
        self.prefix = prefix  # the pieces that are read, for whom they may serve again
        self.reused = 0  # positions that had been read for an earlier turn
        self.sampling = options.sampling.text, options.sampling.audio
        self.recent = [Recent(sampling) for sampling in self.sampling]
        self._numbers: list[list[float]] = []  # of the next steps, per track
        self._numbered = 0  # the first of them
        self._feed = (prompt.audio_ids[-1], prompt.text_ids[-1])

    @property
    def cache(self) -> GrowingCache:
        """Its keys and values."""
        return self.prefix.cache

    @property
    def waits_for_prefill(self) -> bool:
        """Whether a part of the prompt before its last position has not been read yet."""
        return self.cache.length < len(self.prompt.audio_ids) - 1

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.tracks.stop is not None or self.tracks.index >= self.tracks.options.max_steps

    def feed(self) -> RowFeed:
        """The next position."""
        return RowFeed(*self._feed, self.cache, text=self.tracks.draws_text, audio=self.tracks.speaks)

    def wants(self, track: Track) -> bool:
        """Whether the next step draws an id of the track."""
        if track is Track.AUDIO:
            return self.tracks.draws_audio
        return self.tracks.draws_text and not self.tracks.replaying

    def number(self, track: Track) -> float:
        """The uniform number of the next id of the track; 0 where none is needed."""
        if self.sampling[track].greedy or not self.wants(track):
            return 0.0
        options, index = self.tracks.options, self.tracks.index
        if options.uniforms is not None:
            return options.uniforms(track, index)
        if not self._numbers or index - self._numbered >= NUMBERS:
            self._numbers, self._numbered = uniforms(options.seed, index, NUMBERS).tolist(), index
        return self._numbers[track][index - self._numbered]

    def record(self, text_id: int | None, audio_id: int | None) -> Step:
        """Take the step with what was drawn. Raises ParameterError for a replay that cannot be."""
        step = self.tracks.record(text_id, audio_id)
        self.recent[Track.TEXT].add(step.text_id)
        self.recent[Track.AUDIO].add(step.audio_id)
        self._feed = (step.audio_id, step.text_id)
        return step


class Engine:
    """The language model answering up to `rows` turns per step."""

    def __init__(self, lm: DualTrackLM, rows: int, prefixes: Prefixes | None = None) -> None:
        """Without `prefixes` nothing is kept between turns.

        Raises ConfigError for a model with which a turn's numbers would depend on its place in the batch.
        """
        if lm.config.intermediate_size % LANES:
            raise ConfigError(
                f"intermediate_size must be a multiple of {LANES} to answer several turns at once, "
                f"got {lm.config.intermediate_size}"
            )
        self.lm = lm
        self.rows = rows
        self.piece = PIECE[lm.device.type]
        self.prefixes = Prefixes(limit=0) if prefixes is None else prefixes
        self._fused = PagedLM(lm, rows) if lm.device.type == "cuda" else FusedLM(lm, rows)
        self._draws: Draws | None = None
        self._drawn_by: list[list[TrackSampling]] = []

    def begin(self, prompt: Row, tokens: TrackTokens, options: GenerateOptions, conversation: str = "") -> Answer:
        """A turn, nothing computed yet; `conversation` names it for its next turn ("": it has none).

        Raises ParameterError as `generate` does, and for what exceeds the context.
        """
        if options.output_type == "both" and self.lm.text_only:
            raise ParameterError("the model was loaded for text only; load it with its audio branch to make speech")
        if any(begin + codes >= len(prompt.audio_ids) for begin, codes in prompt.segments):
            raise ParameterError("a prompt ends with the start of the answer, not with audio")
        if (
            len(prompt.audio_ids) + options.max_steps > self.lm.config.max_positions + 1
        ):  # the last ids are not fed back
            raise ParameterError(
                f"{len(prompt.audio_ids)} positions and {options.max_steps} steps exceed the context of "
                f"{self.lm.config.max_positions}"
            )
        cache = self._fused.new_cache(audio=options.output_type == "both")
        return Answer(prompt, tokens, options, Prefix(cache, conversation if self.prefixes.limit else ""))

    @torch.inference_mode()
    def prefill(self, answer: Answer) -> None:
        """Read the next piece of the prompt that is not there yet. Raises AudioError when features do not fit."""
        if answer.cache.length == 0:
            self._take_up(answer)
        if answer.waits_for_prefill:
            end = len(answer.prompt.audio_ids) - 1
            self._read(answer.prompt, end, answer.prefix, text=answer.tracks.draws_text, audio=answer.tracks.speaks)

    def _read(self, row: Row, end: int, prefix: Prefix, *, text: bool, audio: bool) -> None:
        """Read the next piece of a row, no further than `end`."""
        begin, cache = prefix.cache.length, prefix.cache
        end = min(begin + self.piece, end)
        piece = part(row, begin, end)
        batch = stack([piece], self.lm.device)
        cache.reserve(end)
        extent = self.lm.extent(batch.counts, cache)
        hidden = self.lm.trunk(self.lm.embed(batch), extent)
        if text:
            self.lm.text_branch(hidden, extent)
        if audio:
            self.lm.audio_branch(hidden, extent)
        cache.advance(end - begin)
        if prefix.conversation and end - begin == self.piece:
            prefix.note(content_of(piece), text=text, audio=audio)

    # ---- between the turns of a conversation ----

    def _take_up(self, answer: Answer) -> None:
        """Begin with what is kept of the conversation, as far as the prompt begins with it."""
        tracks, conversation = answer.tracks, answer.prefix.conversation
        found = self.prefixes.take(
            conversation, self._contents(answer.prompt), text=tracks.draws_text, audio=tracks.speaks
        )
        if found is not None:
            answer.prefix, pieces = found
            answer.prefix.cut(pieces, self.piece)
            answer.reused = answer.cache.length

    def _contents(self, prompt: Row) -> Iterator[PieceContent]:
        """What the prompt's whole pieces contain, its last position left out: that one takes the decode step."""
        for begin in range(0, len(prompt.audio_ids) - self.piece, self.piece):
            yield content_of(part(prompt, begin, begin + self.piece))

    def keep(self, answer: Answer, after: Row | None = None) -> None:
        """An answer has ended: keep the KV of its prompt for the conversation's next turn.

        `after` is what the history then has behind the prompt, to be read ahead; it has no continuous features.
        """
        prefix, prompt = answer.prefix, answer.prompt
        if not prefix.conversation:
            return
        prefix.cut(len(prefix.contents), self.piece)
        prefix.ahead = None
        if after is not None:
            row = Row(
                (*prompt.audio_ids, *after.audio_ids),
                (*prompt.text_ids, *after.text_ids),
                prompt.segments,
                prompt.features,
            )
            prefix.ahead = Ahead(row, answer.tracks.speaks)
        self.prefixes.keep(prefix)

    @torch.inference_mode()
    def read_ahead(self, conversation: str) -> bool:
        """Read one whole piece of the history that the conversation's next prompt will begin with.

        False when there is none left, or when nothing is kept any more.
        """
        prefix = self.prefixes.get(conversation)
        if prefix is None or prefix.ahead is None:
            return False
        ahead = prefix.ahead
        prefix.cut(prefix.held(text=True, audio=ahead.audio), self.piece)  # pieces that lack a branch are read again
        end = prefix.cache.length + self.piece
        if end > len(ahead.row.audio_ids):
            prefix.ahead = None  # with the features that it holds
            return False
        self._read(ahead.row, end, prefix, text=True, audio=ahead.audio)
        return True

    @torch.inference_mode()
    def step(self, answers: Sequence[Answer]) -> list[Step | KimiaError]:
        """One step of each, up to `rows` of them: what came of it, or the error that ends this one answer."""
        wanted = Wanted(*(any(answer.wants(track) for answer in answers) for track in TRACKS))
        logits = self._fused.step([answer.feed() for answer in answers], wanted)
        return [_recorded(*each) for each in zip(answers, *self._draw(logits, wanted, answers), strict=True)]

    def _draw(self, logits: Tensor, wanted: Wanted, answers: Sequence[Answer]) -> list[list[int | None]]:
        """Of each track an id per answer: None where the logits are no numbers, anything where none is wanted."""
        drawn: list[list[int | None]] = [[None] * len(answers) for _ in TRACKS]
        tracks = [track for track in TRACKS if wanted[track]]
        if not tracks:
            return drawn
        sampling = [[answer.sampling[track] for answer in answers] for track in tracks]
        if self._draws is None or self._drawn_by != sampling:
            self._draws, self._drawn_by = Draws(sampling, logits.shape[-1]), sampling
        recent = [[answer.recent[track] for answer in answers] for track in tracks]
        numbers = [[answer.number(track) for answer in answers] for track in tracks]
        their = logits[tracks[0] : tracks[-1] + 1, : len(answers)]
        for track, ids in zip(tracks, self._draws.draw(their, recent, numbers), strict=True):
            drawn[track] = ids
        return drawn


def context_bytes(lm: DualTrackLM) -> int:
    """Memory of the KV of one turn that fills the context."""
    config = lm.config
    slots = config.layers + (0 if lm.text_only else config.mimo_layers)
    return 2 * slots * config.kv_heads * config.head_dim * config.max_positions * lm.like.itemsize


def part(row: Row, begin: int, end: int) -> Row:
    """Positions begin..end of a row, with the features that belong to them. Raises AudioError as `stack` does."""
    segments, features = [], []
    for (start, codes), frames in zip(row.segments, row.features or [], strict=bool(row.features)):
        first, last = max(start, begin), min(start + codes, end)
        if first < last:
            segments.append((first - begin, last - first))
            features.append(frames[first - start :])
    return Row(row.audio_ids[begin:end], row.text_ids[begin:end], segments, features)


def _recorded(answer: Answer, text_id: int | None, audio_id: int | None) -> Step | KimiaError:
    """The step that comes of what was drawn, or the error that ends the answer."""
    wants_text, wants_audio = answer.wants(Track.TEXT), answer.wants(Track.AUDIO)
    if (wants_text and text_id is None) or (wants_audio and audio_id is None):
        return no_numbers()
    try:
        return answer.record(text_id if wants_text else None, audio_id if wants_audio else None)
    except ParameterError as error:
        return error
