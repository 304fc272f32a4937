"""The detokenizer: semantic tokens in, waveform out, push by push.

`Detokenizer` holds the weights and is never modified; `Synthesis` is one turn. A push solves its tokens behind the
look-ahead of the last one, commits all but its own look-ahead, and gives out what the seam lets go. The state is
replaced as a whole at the end of a push, so a push that fails leaves it as it was and can be repeated. `restore` goes
on behind pushes that were made elsewhere, from the mels that they committed: the same state, without solving again.

Shapes: T mel frames, M mel bins, S samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kimia.errors import ConfigError, ParameterError
from kimia.model import philox
from kimia.model.bigvgan import Vocoder, load_vocoder, mel_spectrogram
from kimia.model.checkpoint import Checkpoint
from kimia.model.chunking import Push, pushes
from kimia.model.crossfade import Tail, rendered_mel
from kimia.model.dit import Chunk, DiT, Prefix, load_dit
from kimia.model.flow_cache import FlowCache
from kimia.model.flow_engine import FlowEngine, Solving
from kimia.model.presets import Preset

UPSAMPLE = 4  # mel frames per token: 12.5 Hz repeated to 50 Hz; a constant of the release's code, in no config
PROMPT_CHUNK = 150  # mel frames: 3 s, the longest chunk of training (chunk_params.max_chunk)
PROMPT_CHUNKS = 10  # full chunks of a prompt; what exceeds them makes its first chunk longer

Noise = Callable[[int, tuple[int, int]], Tensor]  # (chunk index, (T, M)) -> standard normal float32


@dataclass(frozen=True, eq=False)
class Detokenizer:
    """Weights and configs of the flow model and the vocoder."""

    dit: DiT
    vocoder: Vocoder
    upsample: int = UPSAMPLE

    def __post_init__(self) -> None:
        if self.dit.config.mel_bins != self.vocoder.config.mel_bins:
            raise ConfigError(
                f"the flow model makes {self.dit.config.mel_bins} mel bins (input_size), "
                f"the vocoder takes {self.vocoder.config.mel_bins} (num_mels)"
            )

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, upsample: int = UPSAMPLE
    ) -> Detokenizer:
        """Load both parts of a checkpoint. `dtype` is the flow model's, which does nearly all the work.

        The vocoder stays in float32: bfloat16 would leave the waveform 8 bits. Raises CheckpointError.
        """
        dit = load_dit(checkpoint.flow, device, dtype)
        return cls(dit, load_vocoder(checkpoint.vocoder, device, torch.float32), upsample)

    @cached_property
    def engine(self) -> FlowEngine:
        """What solves the chunks of turns that are pushed one after the other."""
        return FlowEngine(self.dit)

    @property
    def sample_rate(self) -> int:
        """Of the waveform, Hz."""
        return self.vocoder.config.sample_rate

    @property
    def samples_per_token(self) -> int:
        """Samples that each token becomes."""
        return self.vocoder.config.hop * self.upsample

    @property
    def codes(self) -> int:
        """Number of semantic tokens; legal ids lie below it."""
        return self.dit.config.audio_codes

    def stream(self, preset: Preset, seed: int, noise: Noise | None = None) -> Synthesis:
        """Begin a turn. `noise` replaces the Philox noise of the seed. Raises ParameterError for an illegal seed."""
        return Synthesis(self, preset, noise or _seeded_noise(philox.check_seed(seed)))

    def synthesize(self, codes: Iterable[int], preset: Preset, seed: int, noise: Noise | None = None) -> Tensor:
        """The waveform of a whole turn (S,), float32 on the CPU: bit for bit what streaming gives."""
        synthesis = self.stream(preset, seed, noise)
        return torch.cat([synthesis.push(push.tokens, push.final) for push in pushes(preset, codes)])


def _seeded_noise(seed: int) -> Noise:
    return lambda chunk, shape: torch.from_numpy(philox.normal(seed, chunk, shape))


@dataclass(frozen=True)
class Report:
    """What one push did."""

    mel: Tensor  # committed frames, de-normalised, (T, M) float32 on the CPU
    committed: Tensor | None  # the same, normalised: what `restore` needs; None where nothing can be restored from it
    start_position: int  # of the first frame solved
    frames_in: int  # frames solved, look-ahead included
    frames_committed: int
    kv_frames_after: int  # prefix length for the next push
    next_start_position: int
    samples_out: int
    held_samples: int
    held_mel_frames: int


@dataclass(frozen=True)
class _Prompt:
    """What a position reset goes back to."""

    prefix: Prefix
    position: int  # of the first frame behind it


@dataclass(frozen=True)
class _Heard:
    """What the network attends to, and where the next frame stands. A chunk that begins writes behind it."""

    cache: FlowCache
    position: int


@dataclass(frozen=True)
class _State:
    """One turn between two pushes."""

    heard: _Heard
    prompt: _Prompt
    left: tuple[int, ...] = ()  # look-ahead tokens, to be solved again
    tail: Tail | None = None
    chunks: int = 0
    finished: bool = False


@dataclass(frozen=True, eq=False)
class Begun:
    """A push that waits for its chunk to be solved."""

    state: _State
    heard: _Heard
    solving: Solving | None  # None: nothing is left to solve
    left: tuple[int, ...]  # look-ahead for the next push
    tokens: int  # solved
    final: bool


@dataclass(frozen=True)
class _Part:
    """One push that was made elsewhere."""

    kept: tuple[int, ...]  # ids that it committed
    tokens: int  # ids that it solved
    x: Tensor  # their normalised mel (T, M)


class Synthesis:
    """One turn of speech. `report` tells what the last push did, None before the first."""

    def __init__(self, detokenizer: Detokenizer, preset: Preset, noise: Noise) -> None:
        self.detokenizer = detokenizer
        self.preset = preset
        self.report: Report | None = None
        self._noise = noise
        self._grid = preset.grid
        self._begun: Begun | None = None
        self._silence = _Prompt(detokenizer.dit.empty_prefix(), 0)
        self._state = _State(heard=self._behind(self._silence), prompt=self._silence)

    @property
    def position(self) -> int:
        """Absolute position of the next mel frame."""
        return self._state.heard.position

    @property
    def kv_frames(self) -> int:
        """Mel frames that the next push attends to besides its own."""
        return self._state.heard.cache.frames

    # ---- tokens ----

    @torch.inference_mode()
    def push(self, tokens: Sequence[int], final: bool = False) -> Tensor:
        """Synthesise further tokens: the samples that are settled now, (S,) float32 on the CPU, possibly none.

        A final push may be empty and brings out everything held back. Raises ParameterError for an illegal id, a
        non-final push that its look-ahead uses up, or a push after the final one; the state then stays as it was.
        """
        begun = self.begin(tokens, final)
        if begun.solving is not None:
            self.detokenizer.engine.solve(begun.solving)
        return self.finish(begun)

    @torch.inference_mode()
    def begin(self, tokens: Sequence[int], final: bool = False) -> Begun:
        """The first part of a push: what is to be solved. The state stays as it is. Raises ParameterError.

        A push that was begun before and not finished is given up: both would write to the same place.
        """
        state = self._state
        fresh = self._checked(tokens)
        self._check_push(len(fresh), final)
        ids = state.left + fresh
        heard = self._placed(state.heard, len(ids))
        kept = len(ids) if final else len(ids) - self.preset.look_ahead
        solving = self._solving(ids, kept, heard, final) if ids else None
        self._begun = Begun(state, heard, solving, left=ids[kept:], tokens=len(ids), final=final)
        return self._begun

    def rendered_frames(self, begun: Begun) -> int:
        """Mel frames of `rendered`."""
        tail = begun.state.tail
        return len(self._solved(begun)) + (0 if tail is None else len(tail.mel))

    @torch.inference_mode()
    def rendered(self, begun: Begun) -> Tensor:
        """What the vocoder makes sound of for a push whose chunk is solved: de-normalised mel (F, M), F possibly 0."""
        return rendered_mel(self._denormalised(self._solved(begun)), begun.state.tail)

    @torch.inference_mode()
    def finish(self, begun: Begun, wave: Tensor | None = None) -> Tensor:
        """The last part of a push, when its chunk is solved: the samples. Raises ParameterError if it is not.

        `wave` is the vocoder's for the mel of `rendered`, where it was made together with those of other turns.
        """
        state, solving, final = begun.state, begun.solving, begun.final
        if begun is not self._begun or not (solving is None or solving.done):
            raise ParameterError("a push ends when its chunk is solved, and before the next one begins")
        if solving is None and state.tail is None:
            self._begun, self._state = None, replace(state, finished=True)
            return torch.empty(0)
        x = self._solved(begun)
        mel = self._denormalised(x)
        wave = self._vocode(rendered_mel(mel, state.tail)) if wave is None else wave
        pcm, tail = self.preset.seam.join(wave, mel, state.tail, final)
        pcm, x, mel = pcm.cpu(), x.cpu(), mel.cpu()
        # Nothing fails from here on: what is heard changes in place.
        nothing_more = final or solving is None
        after = self._behind(self._silence) if nothing_more else self._after(begun.heard, mel.shape[0])
        self.report = Report(
            mel=mel,
            committed=None if final or not self.preset.look_ahead else x,
            start_position=begun.heard.position,
            frames_in=begun.tokens * self.detokenizer.upsample,
            frames_committed=mel.shape[0],
            kv_frames_after=after.cache.frames,
            next_start_position=after.position,
            samples_out=pcm.shape[0],
            held_samples=0 if tail is None else tail.wave.shape[0],
            held_mel_frames=0 if tail is None else tail.mel.shape[0],
        )
        self._begun = None
        self._state = replace(state, heard=after, left=begun.left, tail=tail, chunks=state.chunks + 1, finished=final)
        return pcm

    def _checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        codes = self.detokenizer.codes
        try:
            ids = tuple(operator.index(token) for token in tokens)
        except TypeError as error:
            raise ParameterError(f"semantic tokens must be integers ({error})") from error
        for index, token in enumerate(ids):
            if not 0 <= token < codes:
                raise ParameterError(f"semantic token {index} is {token}, legal ids are 0..{codes - 1}")
        return ids

    def _check_push(self, count: int, final: bool) -> None:
        if self._state.finished:
            raise ParameterError("this turn had its final push; begin another with Detokenizer.stream")
        look_ahead = self.preset.look_ahead
        if not final and len(self._state.left) + count <= look_ahead:
            least = look_ahead + 1 - len(self._state.left)
            raise ParameterError(
                f"a non-final push needs at least {least} tokens here (look-ahead {look_ahead}), got {count}; "
                "wait for more, or push them as final"
            )

    def _solving(self, ids: tuple[int, ...], kept: int, heard: _Heard, final: bool) -> Solving:
        """The ids behind what is heard, from the noise of this chunk."""
        dit = self.detokenizer.dit
        shape = (len(ids) * self.detokenizer.upsample, dit.config.mel_bins)
        noise = self._noise(self._state.chunks, shape)
        if tuple(noise.shape) != shape:
            raise ParameterError(f"the noise of a chunk must have the shape {shape}, got {tuple(noise.shape)}")
        chunk = self._chunk(ids, self.detokenizer.upsample, heard)
        # Without look-ahead the release keeps what its last ODE step has left behind.
        commits = not final and self.preset.look_ahead > 0
        return Solving(chunk, noise.to(dit.device, torch.float32)[None], self._grid, kept, commits)

    def _behind(self, prompt: _Prompt) -> _Heard:
        """Nothing but a prompt is heard. There is room for the preset's window and two of its largest chunks."""
        largest = (max(self.preset.commits) + self.preset.look_ahead) * self.detokenizer.upsample
        cache = FlowCache(self.detokenizer.dit.empty_prefix(), self.preset.kv_window, 2 * largest)
        cache.hear(prompt.prefix)
        return _Heard(cache, prompt.position)

    def _after(self, heard: _Heard, frames: int) -> _Heard:
        """What is heard behind so many frames that a chunk keeps."""
        after = self._advanced(heard, frames)
        return self._behind(self._state.prompt) if self._exhausted(after.position, frames) else after

    def _solved(self, begun: Begun) -> Tensor:
        """The normalised mel (T, M) that a push keeps."""
        config, device = self.detokenizer.dit.config, self.detokenizer.dit.device
        return torch.empty(0, config.mel_bins, device=device) if begun.solving is None else begun.solving.x[0]

    def _denormalised(self, x: Tensor) -> Tensor:
        config = self.detokenizer.dit.config
        return x * config.mel_std + config.mel_mean

    def _chunk(self, ids: tuple[int, ...], repeat: int, heard: _Heard) -> Chunk:
        cache = heard.cache.room(len(ids) * repeat)
        return self.detokenizer.dit.chunk_within(torch.tensor([ids]), repeat, heard.position, cache)

    def _advanced(self, heard: _Heard, frames: int) -> _Heard:
        """Behind so many frames of the chunk that was written last."""
        heard.cache.keep(frames)
        return _Heard(heard.cache, heard.position + frames)

    def _vocode(self, mel: Tensor) -> Tensor:
        return self.detokenizer.vocoder(mel.T[None])[0]

    # ---- positions: when the turn forgets ----

    def _placed(self, heard: _Heard, tokens: int) -> _Heard:
        """What a chunk of so many tokens is to hear: only the prompt where the model's positions would not reach."""
        return heard if self._start(heard.position, tokens) == heard.position else self._behind(self._state.prompt)

    def _start(self, position: int, tokens: int) -> int:
        """Where a chunk stands that follows `position`. Raises ParameterError for one that never fits."""
        frames = tokens * self.detokenizer.upsample
        limit = self.detokenizer.dit.config.max_positions
        for start in (position, self._state.prompt.position):
            if start + frames <= limit:
                return start
        raise ParameterError(
            f"{frames} mel frames behind a prompt of {self._state.prompt.position} exceed the flow model's "
            f"{limit} positions; push fewer tokens at once"
        )

    def _exhausted(self, position: int, frames: int) -> bool:
        """Whether the preset forgets all but the prompt at `position`, behind a commit of `frames`."""
        limit = self.preset.max_positions
        return limit is not None and position + 2 * frames > limit

    # ---- going on elsewhere ----

    @torch.inference_mode()
    def restore(self, made: Sequence[Push], committed: Sequence[Tensor]) -> None:
        """Stand where another synthesis of this turn stands behind these pushes, none of them final.

        `committed` holds what each has told in `Report.committed`, (T, M) float32. Costs one pass of the network per
        push since the last position reset, and one call of the vocoder. Raises ParameterError when this turn has
        begun, when pushes and mels do not belong together, or for a preset without look-ahead, whose state is more
        than its mels.
        """
        prompt = self._state.prompt
        if self._state.chunks or self._state.finished or not self.preset.look_ahead:
            raise ParameterError("only a turn that has not begun, of a preset with look-ahead, can be restored")
        parts, left = self._parts(made, committed)
        begin, position = 0, prompt.position
        for index, part in enumerate(parts):
            start = self._start(position, part.tokens)
            begin = index if start == prompt.position else begin
            position = start + part.x.shape[0]
            if self._exhausted(position, part.x.shape[0]):
                begin, position = index + 1, prompt.position
        heard = self._behind(prompt)
        for part in parts[begin:]:
            chunk = self._chunk(part.kept, self.detokenizer.upsample, heard)
            self.detokenizer.engine.commit(part.x, chunk)
            heard = self._advanced(heard, chunk.frames)
        self._state = replace(self._state, heard=heard, left=left, tail=self._tail(parts), chunks=len(parts))

    def _parts(self, made: Sequence[Push], committed: Sequence[Tensor]) -> tuple[list[_Part], tuple[int, ...]]:
        """What each push solved and committed, and the look-ahead behind the last."""
        bins, look_ahead = self.detokenizer.dit.config.mel_bins, self.preset.look_ahead
        parts: list[_Part] = []
        left: tuple[int, ...] = ()
        for push, x in zip(made, committed, strict=True):
            ids = left + self._checked(push.tokens)
            kept, left = ids[:-look_ahead], ids[-look_ahead:]
            if push.final or not kept or tuple(x.shape) != (len(kept) * self.detokenizer.upsample, bins):
                rule = f"push {len(parts)} cannot have committed a mel of the shape {tuple(x.shape)}"
                raise ParameterError(f"{rule}; restore a turn from its own reports, in order")
            parts.append(_Part(kept, len(ids), x.to(self.detokenizer.dit.device, torch.float32)))
        return parts, left

    def _tail(self, parts: Sequence[_Part]) -> Tail | None:
        """What the seam holds behind these. A tail's sound is the last rendering's alone; of those before, only its
        length and its mel count, so they are not rendered.
        """
        tail: Tail | None = None
        for index, part in enumerate(parts):
            mel = self._denormalised(part.x)
            seen = rendered_mel(mel, tail)
            silent = seen.new_zeros(seen.shape[0] * self.detokenizer.vocoder.config.hop)
            wave = self._vocode(seen) if index + 1 == len(parts) else silent
            _, tail = self.preset.seam.join(wave, mel, tail, final=False)
        return tail

    # ---- timbre ----

    @torch.inference_mode()
    def prefill(self, wave: Tensor, tokens: Sequence[int], chunk: int = PROMPT_CHUNK) -> None:
        """Let the turn begin behind a spoken prompt, whose voice it then takes on.

        `wave` (S,) lies at the vocoder's rate; `tokens` are one per mel frame (repeat 12.5 Hz tokens `upsample`
        times); the mel is cut or padded to them. The prompt enters in chunks of `chunk` frames and outlives position
        resets. Raises ParameterError for illegal ids, an over-long prompt or a turn that has begun, AudioError for a
        waveform under one frame.
        """
        ids = self._checked(tokens)
        if self._state.chunks or self._state.finished:
            raise ParameterError("a prompt must come before the first push")
        if chunk < 1 or not 0 < len(ids) < self.detokenizer.dit.config.max_positions:
            raise ParameterError(
                f"a prompt needs 1..{self.detokenizer.dit.config.max_positions - 1} frame tokens "
                f"and chunks of at least one frame, got {len(ids)} tokens and chunks of {chunk}"
            )
        mel = self._prompt_mel(wave, len(ids))
        heard = self._behind(self._silence)
        for start, stop in _prompt_pieces(len(ids), chunk):
            piece = self._chunk(ids[start:stop], 1, heard)
            self.detokenizer.engine.commit(mel[start:stop], piece)
            heard = self._advanced(heard, piece.frames)
        self._state = replace(self._state, heard=heard, prompt=_Prompt(heard.cache.held.with_room(0), heard.position))

    def _prompt_mel(self, wave: Tensor, frames: int) -> Tensor:
        """Normalised mel of the prompt, cut or padded to (frames, M)."""
        config = self.detokenizer.dit.config
        mel = mel_spectrogram(wave.to(self.detokenizer.dit.device), self.detokenizer.vocoder.config)[:frames]
        padded = F.pad(mel, (0, 0, 0, frames - mel.shape[0]), value=self.preset.prompt_padding)
        return (padded - config.mel_mean) / config.mel_std


def _prompt_pieces(frames: int, chunk: int) -> list[tuple[int, int]]:
    """Bounds of a prompt's chunks: the odd one comes first, and is left out when empty."""
    first = frames - min(frames // chunk, PROMPT_CHUNKS) * chunk
    bounds = [0, *range(first, frames + 1, chunk)] if first else list(range(0, frames + 1, chunk))
    return list(pairwise(bounds))
