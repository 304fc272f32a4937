"""The language model stage: a conversation and its encoded clips in, one chunk per step out.

The turns of a process take their steps together (`services.llm.scheduler`). An interrupted turn is continued by sending
the ids that were given out through the same steps again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from kimia.compute import ComputeThread, open_model, own_stream, replayed
from kimia.errors import ParameterError
from kimia.model.conversation import Message
from kimia.model.engine import Engine, context_bytes
from kimia.model.generate import GenerateOptions, Step, TrackTokens, collect
from kimia.model.lm import DualTrackLM, Row, load_lm
from kimia.model.prefix import Prefixes
from kimia.model.presets import UPSTREAM
from kimia.model.prompt import Prompt, build_prompt
from kimia.model.text import TextTokenizer
from kimia.pipeline import TextTrack, answer_steps, prompt_row, track_tokens
from kimia.runtime.metrics import PREFIX_POSITIONS, PREFIX_TURNS
from kimia.runtime.settings import Settings
from kimia.stage import LLM, StageKind
from kimia.v1 import conversation_pb2, turn_pb2
from kimia.v1.turn_pb2 import (
    STOP_REASON_AUDIO_EOD,
    STOP_REASON_MAX_NEW_TOKENS,
    STOP_REASON_TEXT_EOS,
    STOP_REASON_UNSPECIFIED,
    Chunk,
    Encoded,
    StageReport,
    StopReason,
    Turn,
)
from services.llm.budget import Fitted, answer_room, fit, turn_starts
from services.llm.conversation import gather_clips, join_clips, read_messages, spoken_message
from services.llm.options import AnswerOptions, read_options
from services.llm.scheduler import Answering, Scheduler

STOPS: dict[str | None, StopReason.ValueType] = {
    None: STOP_REASON_UNSPECIFIED,
    "text_eos": STOP_REASON_TEXT_EOS,
    "audio_eod": STOP_REASON_AUDIO_EOD,
    "max_new_tokens": STOP_REASON_MAX_NEW_TOKENS,
}
WARM_UP_STEPS = 2  # beyond the delay, so that both heads are used


class LanguageModelStage:
    """The language model of one checkpoint with its text tokenizer, `rows` turns to a step."""

    kind: StageKind = LLM

    def __init__(
        self,
        lm: DualTrackLM,
        tokenizer: TextTokenizer,
        compute: ComputeThread,
        rows: int,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`prefixes` keep what turns have read for the next turns of their conversations; without, nothing does."""
        self.lm = lm
        self.tokenizer = tokenizer
        self.compute = compute
        self.tokens = track_tokens(lm.config, tokenizer)
        self.scheduler = Scheduler(Engine(lm, rows, prefixes), compute)

    @classmethod
    def load(cls, settings: Settings, *, shared: bool = False) -> LanguageModelStage:
        """Load the language model of the settings' checkpoint. Raises CheckpointError, ParameterError.

        `shared`: other stages of this process compute there, too; they let its steps go first.
        """
        place = open_model(settings)
        root = place.checkpoint.root
        tokenizer = TextTokenizer.load(root, place.configs.lm)
        lm = load_lm(root, device=place.device, dtype=place.dtype, quantize=settings.quantize)
        memory = settings.prefix_bytes if settings.prefix_bytes >= 0 else settings.rows * context_bytes(lm)
        prefixes = Prefixes(memory, settings.turn_ttl_seconds)
        stream = own_stream(place.device, urgent=True) if shared else None
        return cls(lm, tokenizer, ComputeThread(settings.threads, stream=stream), settings.rows, prefixes)

    async def warm_up(self) -> None:
        """Answer a greeting with a few steps of both tracks."""
        turn = Turn()
        turn.messages.add(role=conversation_pb2.ROLE_USER).text.text = "Hello"
        turn.options.max_new_tokens = self.tokens.delay + WARM_UP_STEPS
        async for _ in self.run(turn, replayed()):
            pass

    def forget(self, session_id: str) -> None:
        """Keep nothing of a deleted session."""
        self.scheduler.forget(lambda conversation: conversation.rpartition(" ")[2] == session_id)

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Answer step by step, or go on behind the steps that were given out already.

        The inbox is read up to the last clip that the prompt needs. Raises ConversationError, AudioError, StateError,
        ParameterError, ContextLengthError, NumericsError.
        """
        if published and published[-1].final:
            return
        compute = self.compute.turn()
        asked = read_options(turn, self.tokenizer)
        messages = read_messages(turn, self.lm.config)
        pieces = await gather_clips(turn, inbox)
        fitted = await compute.run(self._fitted, asked, messages, pieces)
        replay = tuple((chunk.step.text_id, chunk.step.audio_id) for chunk in published)
        options = GenerateOptions(asked.output_type, fitted.steps, asked.sampling, asked.seed, None, asked.say, replay)
        answering = self.scheduler.join(prompt_row(fitted.prompt), self.tokens, options, conversation_of(turn))
        answer = AnswerChunks(self.tokenizer, self.tokens, asked)
        steps: list[Step] = []
        try:
            while (step := await answering.next()) is not None:
                steps.append(step)
                chunk = answer.chunk(step)
                if step.stop is not None:
                    chunk.final = True
                    chunk.report.CopyFrom(_report(compute.seconds + answering.seconds, fitted, step))
                if not step.replayed:
                    yield chunk
        finally:
            answering.leave(self._remembered(asked, steps) if steps else None)
            if steps and any(message.role == "assistant" for message in messages[fitted.dropped :]):
                _count(answering, fitted)

    def _remembered(self, asked: AnswerOptions, steps: Sequence[Step]) -> Row:
        """What stands behind the prompt when the conversation goes on after these steps."""
        result = collect(steps, self.tokens, asked.output_type)
        spoken = spoken_message(result, self.lm.config)
        prompt = build_prompt([spoken], {}, asked.output_type, self.lm.config, self.tokenizer, False)
        return Row(prompt.audio_ids[1:], prompt.text_ids[1:])  # the start of the answer ends the turn's own prompt

    def _fitted(
        self, asked: AnswerOptions, messages: Sequence[Message], pieces: Mapping[int, Sequence[Encoded]]
    ) -> Fitted:
        """The prompt, with as much of the conversation as fits, and the steps that it leaves."""
        config = self.lm.config
        clips = join_clips(messages, pieces, config.adaptor_input_dim)

        def lay_out(start: int) -> Prompt:
            later = {index - start: clip for index, clip in clips.items() if index >= start}
            return build_prompt(messages[start:], later, asked.output_type, config, self.tokenizer)

        def allowed(prompt: Prompt) -> int:
            return answer_steps(prompt, asked.output_type, asked.limit, config, asked.preset)

        said = len(asked.say or ())
        room = answer_room(asked.output_type, config.audio_delay, asked.limit, said)
        fitted = fit(turn_starts(messages), lay_out, allowed, room)
        if asked.say is not None and said >= fitted.steps:
            raise ParameterError(
                f"the text to say has {said} tokens and the answer only {fitted.steps} steps; shorten it"
            )
        return fitted


class AnswerChunks:
    """The steps of one answer as chunks of the log."""

    def __init__(self, tokenizer: TextTokenizer, tokens: TrackTokens, asked: AnswerOptions) -> None:
        self._text = TextTrack(tokenizer, tokens, keep_special=asked.preset is UPSTREAM)
        self._tokens = tokens
        self._speaks = asked.output_type == "both"

    def chunk(self, step: Step) -> Chunk:
        """One step; every step must come, in its order, for the text to be whole."""
        deltas = [*self._text.feed(step), *(self._text.finish(step.index + 1) if step.stop else ())]
        entry = turn_pb2.Step(
            text_id=step.text_id,
            audio_id=step.audio_id,
            text="".join(delta.text for delta in deltas),
            stop=STOPS[step.stop],
            in_transcript=not self._text.ended and step.text_id < self._tokens.token_offset,
            speaking=self._speaks and step.index >= self._tokens.delay,
        )
        if step.audio_id >= self._tokens.token_offset:
            entry.code = step.audio_id - self._tokens.token_offset
        return Chunk(index=step.index, step=entry)


def conversation_of(turn: Turn) -> str:
    """Names the conversation that a turn belongs to, of its tenant's; "": none that goes on."""
    return f"{turn.caller.tenant} {turn.session_id}" if turn.session_id else ""


def _count(answering: Answering, fitted: Fitted) -> None:
    """Note how much of a later turn's prompt was there already."""
    reused = answering.answer.reused
    PREFIX_TURNS.labels("hit" if reused else "miss").inc()
    PREFIX_POSITIONS.labels("hit").inc(reused)
    PREFIX_POSITIONS.labels("miss").inc(len(fitted.prompt) - reused)


def _report(seconds: float, fitted: Fitted, last: Step) -> StageReport:
    return StageReport(
        compute_seconds=seconds,
        prompt_positions=len(fitted.prompt),
        dropped_messages=fitted.dropped,
        units=last.index + 1,
    )
