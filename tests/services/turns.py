"""Turns for the stages and what comes of them, beside the same turns of the plain pipeline."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import soundfile

from kimia.model.generate import Result
from kimia.pipeline import AudioChunk, KimiAudio, TextDelta, TurnDone
from kimia.runtime.local import run_route
from kimia.sound import to_s16
from kimia.stage import STAGES
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, ROLE_USER, Message, OutputType, Spoken, Text, TurnOptions
from kimia.v1.turn_pb2 import Chunk, InputAudio, Turn
from tests.golden_data import COMMITTED

AUDIO = COMMITTED / "e2e" / "audio"
QUESTION, CALL = AUDIO / "clip_b2.wav", AUDIO / "call_8k.wav"  # 1.5 s at 16 kHz, and a telephone call
FILE = AudioFormat(encoding=ENCODING_FILE)
PCM16 = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)


# ---- turns ------------------------------------------------------------------------------------------------------


def text(content: str, role: int = ROLE_USER) -> Message:
    return Message(role=role, text=Text(text=content))


def heard(number: int = 0, form: AudioFormat = FILE) -> Message:
    return Message(role=ROLE_USER, audio=Clip(number=number, format=form))


def spoken(transcript: str, **clip) -> Message:
    return Message(role=ROLE_ASSISTANT, spoken=Spoken(clip=Clip(**clip), transcript=Text(text=transcript)))


def turn(messages: Sequence[Message], route: str = "tokenizer llm detokenizer", seed: int = 0, **options) -> Turn:
    """A turn; `output_type` by name, `say` and the fields of TurnOptions by keyword."""
    made = Turn(id="s.t", session_id="s", seed=seed, messages=messages, say=options.pop("say", None))
    made.route.extend(STAGES[name].number for name in route.split())
    if "output_type" in options:
        options["output_type"] = OutputType.Value(f"OUTPUT_TYPE_{options['output_type'].upper()}")
    made.options.CopyFrom(TurnOptions(**options))
    return made


def sound_log(*clips: bytes, piece: int = 10_000) -> list[Chunk]:
    """The input log of clips 0, 1, ... in pieces of some bytes."""
    log = []
    for number, data in enumerate(clips):
        for start in range(0, len(data), piece):
            end = start + piece >= len(data)
            log.append(Chunk(input=InputAudio(clip=number, data=data[start : start + piece], clip_end=end)))
    for index, chunk in enumerate(log):
        chunk.index = index
    if log:
        log[-1].final = True
    return log


def pcm_of(path) -> bytes:
    return soundfile.read(path, dtype="int16")[0].tobytes()


async def replayed(chunks: Sequence[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def ran(stage, turn: Turn, inbox: Sequence[Chunk], published: Sequence[Chunk] = ()) -> list[Chunk]:
    """All chunks that one stage gives out."""
    return [chunk async for chunk in stage.run(turn, replayed(inbox), published)]


# ---- what came of them ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A turn in comparable form."""

    text: str
    deltas: list[tuple[int, str]]
    text_ids: list[int]
    audio_ids: list[int]
    codes: list[int]
    stop: str
    prompt_positions: int
    pcm: list[bytes]  # of each chunk


async def staged(stages: dict, turn: Turn, log: Sequence[Chunk] = ()) -> tuple[Outcome, dict[str, list[Chunk]]]:
    """The turn by the stages, and what each gave out."""
    logs: dict[str, list[Chunk]] = {name: [] for name in STAGES}
    async for kind, chunk in run_route(stages, turn, log):
        logs[kind.name].append(chunk)
    for chunks in logs.values():
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True] * bool(chunks)
        assert all(chunk.HasField("report") == chunk.final for chunk in chunks)
    steps = [chunk.step for chunk in logs["llm"]]
    outcome = Outcome(
        text="".join(step.text for step in steps),
        deltas=[(index, step.text) for index, step in enumerate(steps) if step.text],
        text_ids=[step.text_id for step in steps],
        audio_ids=[step.audio_id for step in steps],
        codes=[step.code for step in steps if step.HasField("code")],
        stop=steps[-1].DESCRIPTOR.fields_by_name["stop"].enum_type.values_by_number[steps[-1].stop].name,
        prompt_positions=logs["llm"][-1].report.prompt_positions,
        pcm=[chunk.speech.pcm for chunk in logs["detokenizer"] if chunk.speech.pcm],
    )
    return outcome, logs


def plain(
    model: KimiAudio, chats, output_type: str = "both", say: str | None = None, **options
) -> tuple[Outcome, TurnDone]:
    """The same turn by the plain pipeline."""
    ids = None if say is None else tuple(model.tokenizer.encode(say))
    prepared = model._prepare(chats, output_type, {"preset": "low-latency", "seed": 0, **options}, ids)
    events = list(model._events(prepared, model._synthesis(prepared)))
    done = events[-1]
    assert isinstance(done, TurnDone)
    result: Result = done.result
    merged: dict[int, str] = {}
    for event in events:
        if isinstance(event, TextDelta):
            merged[event.step] = merged.get(event.step, "") + event.text
    outcome = Outcome(
        text=done.text,
        deltas=list(merged.items()),
        text_ids=list(result.text_stream),
        audio_ids=list(result.audio_stream),
        codes=list(result.audio_codes),
        stop=f"STOP_REASON_{result.stop}".upper(),
        prompt_positions=done.prompt_positions,
        pcm=[to_s16(event.pcm).tobytes() for event in events if isinstance(event, AudioChunk)],
    )
    return outcome, done
