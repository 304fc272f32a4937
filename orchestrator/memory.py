"""What a session remembers, and what the next turn is told of it. Pure: records, turns and logs in, messages out.

    user's sound        codes and feature keys from the log `encoded`; the sound stays in the input log it came in
    assistant's answer  by the ids from the log `tokens`, so that it is never encoded again; cut to what was heard

The answer is that of `TurnDone.message(heard)` in `kimia.pipeline`: the first k codes, and the text ids of the steps
before delay + k. The delay is not known here: it is the number of steps before the first that says `speaking`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kimia.clips import wanted_sounds
from kimia.stage import CODE_SECONDS, DETOKENIZER, LLM, TOKENIZER, StageKind
from kimia.v1.audio_pb2 import Clip
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT, ROLE_ASSISTANT, Message, Spoken, Text, TurnOptions
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import Chunk, Step, Turn

CODE_MS = round(CODE_SECONDS * 1000)
REMEMBERED_TURNS = 64  # ids of turns that a session keeps, beside those whose sounds it remembers

# ---- clips ------------------------------------------------------------------------------------------------------


def clips_of(messages: Iterable[Message]) -> list[Clip]:
    """The clips of messages, in order; changing one changes its message."""
    found = []
    for message in messages:
        if message.HasField("audio"):
            found.append(message.audio)
        elif message.HasField("spoken"):
            found.append(message.spoken.clip)
    return found


@dataclass
class EncodedClip:
    """What the tokenizer made of one clip."""

    codes: list[int] = field(default_factory=list)
    feature_keys: list[str] = field(default_factory=list)
    complete: bool = False


def encoded_clips(encoded: Iterable[Chunk]) -> dict[int, EncodedClip]:
    """The clips of a log `encoded` by number. Of one that came twice the first run counts."""
    clips: dict[int, EncodedClip] = {}
    for chunk in encoded:
        clip = clips.setdefault(chunk.encoded.clip, EncodedClip())
        if clip.complete:
            continue
        clip.codes.extend(chunk.encoded.codes)
        if chunk.encoded.feature_key:
            clip.feature_keys.append(chunk.encoded.feature_key)
        clip.complete = chunk.encoded.clip_end
    return clips


def learn_clips(messages: Iterable[Message], turn: Turn, encoded: Iterable[Chunk]) -> None:
    """Write into messages what a turn has found out about their clips, wherever their sound came from."""
    found = encoded_clips(encoded)
    by_source = {
        (clip.source_turn, clip.source_number): found[clip.number]
        for clip in clips_of(turn.messages)
        if clip.number in found and clip.source_turn and found[clip.number].complete
    }
    for clip in clips_of(messages):
        known = by_source.get((clip.source_turn, clip.source_number))
        if known is not None:
            clip.codes[:] = known.codes
            clip.feature_keys[:] = known.feature_keys


def feature_keys(messages: Iterable[Message]) -> list[str]:
    """Keys of all blobs that messages name."""
    return list(dict.fromkeys(key for clip in clips_of(messages) for key in clip.feature_keys))


def forget_blobs(messages: Iterable[Message], missing: Iterable[str]) -> None:
    """Let clips whose blobs are missing be encoded again."""
    gone = set(missing)
    for clip in clips_of(messages):
        if not gone.isdisjoint(clip.feature_keys):
            del clip.feature_keys[:]


# ---- the next turn ----------------------------------------------------------------------------------------------


def sourced(turn_id: str, messages: Sequence[Message]) -> list[Message]:
    """Messages whose sound lies in this turn's input log."""
    copies = []
    for message in messages:
        copy = Message()
        copy.CopyFrom(message)
        for clip in clips_of([copy]):
            clip.source_turn = turn_id
        copies.append(copy)
    return copies


def conversation(turn_id: str, history: Sequence[Message], asked: Sequence[Message]) -> list[Message]:
    """The messages of a turn, its clips numbered: its own as in its input log, after them those of earlier turns."""
    messages = [_copy(message) for message in (*history, *asked)]
    clips = clips_of(messages)
    own = [clip for clip in clips if clip.source_turn == turn_id]
    for clip in own:
        clip.number = clip.source_number
    first = max((clip.number for clip in own), default=-1) + 1
    for number, clip in enumerate((clip for clip in clips if clip.source_turn != turn_id), first):
        clip.number = number
    return messages


def route_for(messages: Sequence[Message], options: TurnOptions) -> tuple[StageKind, ...]:
    """The stages that a turn must pass."""
    encodes = any(sound.must_be_encoded for sound in wanted_sounds(messages).values())
    speaks = options.output_type != OUTPUT_TYPE_TEXT
    return (*((TOKENIZER,) if encodes else ()), LLM, *((DETOKENIZER,) if speaks else ()))


def _copy(message: Message) -> Message:
    copy = Message()
    copy.CopyFrom(message)
    return copy


# ---- the answer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer as it is remembered; None when the turn took no step."""

    message: Message | None
    codes: int  # semantic tokens that are left of it


def answer_of(tokens: Iterable[Chunk], heard: int | None = None) -> Answer:
    """The answer of a log `tokens`; `heard` keeps only its first codes and the text that had led to them."""
    steps = [chunk.step for chunk in tokens]
    if not steps:
        return Answer(None, 0)
    if not any(step.speaking for step in steps):
        return Answer(Message(role=ROLE_ASSISTANT, text=Text(ids=_transcript(steps))), 0)
    delay = next(index for index, step in enumerate(steps) if step.speaking)
    codes = [step.code for step in steps if step.HasField("code")][:heard]
    transcript = Text(ids=_transcript(steps[: delay + len(codes)]))
    spoken = Spoken(clip=Clip(codes=codes), transcript=transcript)
    return Answer(Message(role=ROLE_ASSISTANT, spoken=spoken), len(codes))


def _transcript(steps: Sequence[Step]) -> list[int]:
    return [step.text_id for step in steps if step.in_transcript]


def codes_heard(heard_ms: int) -> int:
    """Semantic tokens that were heard to their end."""
    return heard_ms // CODE_MS


# ---- after the turn ---------------------------------------------------------------------------------------------


def remember(record: SessionRecord, turn: Turn, encoded: Sequence[Chunk], answer: Message | None, dropped: int) -> None:
    """Take a finished or cancelled turn into the conversation; the `dropped` oldest messages are forgotten."""
    messages = [*record.messages, *record.asked, *([] if answer is None else [answer])]
    learn_clips(messages, turn, encoded)
    kept = [_copy(message) for message in messages[dropped:]]
    del record.messages[:]
    record.messages.extend(kept)
    end_turn(record)


def end_turn(record: SessionRecord) -> None:
    """No turn is running any more; what it was asked and has not become part of the conversation is forgotten."""
    del record.asked[:]
    record.ClearField("starting")
    record.running_turn_id = ""
    record.heard_ms = 0
    sources = {clip.source_turn for clip in clips_of([*record.messages, *record.pending])}
    recent = record.turn_ids[-REMEMBERED_TURNS:]
    record.turn_ids[:] = [turn for turn in record.turn_ids if turn in sources or turn in recent]
    for key in [key for key, turn in record.turn_of_key.items() if turn not in recent]:
        del record.turn_of_key[key]


def cut_answer(record: SessionRecord, turn_id: str, answer: Answer | None) -> int:
    """Put a shorter answer in the place of the turn's; the codes of it that are remembered then.

    Nothing changes when the conversation has gone on, when nothing of the turn is remembered, and without an answer.
    """
    last = record.messages[-1] if record.messages else Message()
    if last.role != ROLE_ASSISTANT or not record.turn_ids or record.turn_ids[-1] != turn_id:
        return 0
    codes = len(last.spoken.clip.codes)
    if answer is None or answer.message is None or answer.codes >= codes:
        return codes
    last.CopyFrom(answer.message)
    return answer.codes
