"""How often sound and features are copied on their way through a process: never without need (docs/architecture.md).

Three rules are held. A field of bytes is read once, since each look at it makes a copy. A message that carries sound is
filled in place, never given to another one, which would copy it whole. And what a step holds at once, beside what it
was given, is no more than what it gives and the one conversion that it is for: as bytes for each byte given, counted by
tracemalloc, which sees Python's and numpy's memory.
"""

import tracemalloc

import numpy as np
import pytest
import torch
from google.protobuf.message import Message as Proto

from kimia.clips import wanted_sounds
from kimia.compute import feature_rows
from kimia.model.encode import EncodedAudio
from kimia.runtime import inputs
from kimia.runtime.inputs import FeatureOutlet, read_encoded, read_sound, sounds_to_encode
from kimia.runtime.mels import MelOutlet
from kimia.sound import decode, to_s16
from kimia.v1.audio_pb2 import ENCODING_MULAW, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.kimi_audio_pb2 import CallConfig, CallerAudio, ConverseRequest
from kimia.v1.turn_pb2 import FEATURE_TYPE_F32, Chunk, Encoded, InputAudio, Speech, Turn
from orchestrator import call, following, turn
from orchestrator.following import Following
from orchestrator.session import AppendAudio, Session, SessionView
from orchestrator.sound import OutputSound
from services.detokenizer import stage as detokenizer_stage
from services.llm.conversation import join_clips
from services.tokenizer import stage as tokenizer_stage
from services.tokenizer.gathering import ClipReader
from tests.orchestrator.world import NATIVE
from tests.runtime.test_inputs import Blobs, Feed, Journal
from tests.runtime.workers import heard, new_turn

pytestmark = pytest.mark.unit

PCM = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
SECONDS = 40
SOUND = np.random.default_rng(0).integers(-9000, 9000, 16000 * SECONDS).astype("<i2").tobytes()
WIDTH = 5120  # of a feature, as released
ROWS = 375  # 30 s
FEATURES = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
LITTLE = 1000  # bytes that may be copied
SLACK = 0.1  # of the bytes given: objects, and numpy's buffers


class Reads:
    """A message that counts how often a field of bytes is read, its own and those of its messages."""

    def __init__(self, message, counts=None):
        self.__dict__.update(message=message, counts={} if counts is None else counts)

    def __getattr__(self, name):
        value = getattr(self.message, name)
        if isinstance(value, bytes):
            self.counts[name] = self.counts.get(name, 0) + 1
        return Reads(value, self.counts) if isinstance(value, Proto) else value

    def __setattr__(self, name, value):
        setattr(self.message, name, value)


def held(work, given):
    """What `work` returns, and the most that it held at once, in bytes for each byte given."""
    work()  # what is set up only once
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = work()
        return result, (tracemalloc.get_traced_memory()[1] - before) / given
    finally:
        tracemalloc.stop()


@pytest.fixture
def in_place(monkeypatch):
    """Lets messages of a module's class be made of little ones only."""

    def watch(module, name):
        kind = getattr(module, name)

        def make(**fields):
            copied = {key: value.ByteSize() for key, value in fields.items() if isinstance(value, Proto)}
            assert not {key: size for key, size in copied.items() if size > LITTLE}
            return kind(**fields)

        monkeypatch.setattr(module, name, make)

    return watch


# ---- a caller's sound -------------------------------------------------------------------------------------------


def test_a_piece_of_sound_is_read_once():
    session = Session()
    session.receive(ConverseRequest(config=CallConfig(input_format=PCM)))
    session.opened(SessionView("s", NATIVE))
    request = Reads(ConverseRequest(audio=CallerAudio(data=SOUND[:32000])))
    *_, action = session.receive(request)
    assert isinstance(action, AppendAudio)
    assert action.data == SOUND[:32000]
    assert request.counts == {"data": 1}


def test_a_piece_of_sound_is_written_into_its_entry(in_place):
    in_place(turn, "Chunk")
    in_place(call, "Chunk")
    piece = turn.piece_of_sound(3, 1, SOUND, ends=True)
    assert piece == Chunk(index=3, input=InputAudio(clip=1, data=SOUND, clip_end=True))


async def test_an_entry_of_the_turn_itself_is_given_to_the_stage_as_it_was_read(in_place):
    in_place(inputs, "Chunk")
    asked = new_turn(heard(0))
    log = [Chunk(index=0, input=InputAudio(data=SOUND)), Chunk(index=1, input=InputAudio(clip_end=True), final=True)]
    pieces = await read_sound(Journal(**{asked.id: log}), asked, sounds_to_encode(asked, rewound=False))
    assert all(piece is entry for piece, entry in zip(pieces, log, strict=True))


def test_bytes_become_samples_in_one_pass():
    """Four bytes of float32 for two of the words."""
    samples, most = held(lambda: decode(SOUND, PCM), len(SOUND))
    assert np.array_equal(samples, np.frombuffer(SOUND, "<i2").astype(np.float32) / np.float32(32768))
    assert most < 2 + SLACK


def test_a_clip_that_came_in_pieces_is_held_as_samples_and_as_its_segment():
    [sound] = wanted_sounds([Message(role=ROLE_USER, audio=Clip(format=PCM))]).values()

    def read():
        clip = ClipReader(sound, 16000, SECONDS * 16000)
        for start in range(0, len(SOUND), 3200):
            clip.store(SOUND[start : start + 3200], ends=start + 3200 >= len(SOUND))
        return clip.read()

    [segment], most = held(read, len(SOUND))
    assert np.array_equal(segment.samples, decode(SOUND, PCM))
    assert most < 1.125 + 2 + 2 + SLACK  # the bytes (a bytearray grows by an eighth), the samples, the segment


# ---- features ---------------------------------------------------------------------------------------------------


def encoded_chunks():
    return list(tokenizer_stage.stretches(0, EncodedAudio(tuple(range(ROWS)), FEATURES), last=True))


def test_features_are_written_into_their_chunk(in_place):
    in_place(tokenizer_stage, "Chunk")
    chunks = encoded_chunks()
    assert b"".join(chunk.encoded.features for chunk in chunks) == FEATURES.numpy().tobytes()
    _, most = held(encoded_chunks, FEATURES.nbytes)
    assert most < 12 / ROWS + SLACK  # one stretch at a time


async def test_features_go_into_blobs_without_a_copy_of_their_chunk(in_place):
    in_place(inputs, "Chunk")
    in_place(inputs, "Encoded")
    blobs, asked = Blobs(), new_turn(heard(0))
    outlet = FeatureOutlet(blobs, asked, ("{0}", "t", "weights"), {0: ["content"]})
    chunks = encoded_chunks()
    outs = [out for chunk in chunks for out in await outlet.take(chunk)]
    assert [out.index for out in outs] == list(range(len(chunks)))
    stored = [Encoded.FromString(blobs.kept[out.encoded.feature_key]) for out in outs]
    assert b"".join(one.features for one in stored) == FEATURES.numpy().tobytes()
    assert not any(one.feature_key for one in stored)
    assert all(out is chunk for out, chunk in zip(outs, chunks, strict=True))  # nothing was copied to be changed
    assert not any(out.encoded.features for out in outs)


async def test_the_language_model_lays_features_out_once(in_place):
    blobs = Blobs()
    for at, chunk in enumerate(encoded_chunks()):
        blobs.kept[f"k{at}"] = chunk.encoded.SerializeToString()
    asked = new_turn(heard(0, feature_keys=list(blobs.kept)))
    chunks = await read_encoded(Feed([]), blobs, asked)
    reads = [Reads(chunk.encoded) for chunk in chunks]
    heard_message = type("Heard", (), {"needs_features": True})()
    made = join_clips([heard_message], {0: reads}, WIDTH)
    assert torch.equal(made[0].features, FEATURES)
    assert all(read.counts == {"features": 1} for read in reads)
    pieces = {0: [chunk.encoded for chunk in chunks]}
    _, most = held(lambda: join_clips([heard_message], pieces, WIDTH), FEATURES.nbytes)
    assert most < 2 + SLACK  # read out of the messages, and end to end


def test_rows_lie_in_the_memory_that_they_are_given():
    data = bytearray(FEATURES[:2].numpy().tobytes())
    rows = feature_rows(data, FEATURE_TYPE_F32, WIDTH)
    rows[0, 0] = 7.0
    assert np.frombuffer(data, "<f4")[0] == 7.0


# ---- speech -----------------------------------------------------------------------------------------------------


def test_samples_become_words_in_one_array():
    samples = decode(SOUND, PCM)
    words, most = held(lambda: to_s16(samples), samples.nbytes)
    assert words.tobytes() == SOUND
    assert most < 1 + 0.5 + SLACK  # scaled, and the words


def test_speech_is_written_into_its_chunk(in_place):
    in_place(detokenizer_stage, "Chunk")
    stage = detokenizer_stage.DetokenizerStage.__new__(detokenizer_stage.DetokenizerStage)
    committed = torch.zeros(50, 80)
    stage.detokenizer = type("Rate", (), {"sample_rate": 24000})()
    synthesis = type("Done", (), {"report": type("Report", (), {"committed": committed})()})()
    pushed = type("Push", (), {"final": False})()
    chunk = stage._spoken(synthesis, pushed, torch.from_numpy(decode(SOUND, PCM)))
    assert chunk.speech.pcm == SOUND
    assert chunk.speech.mel == committed.numpy().tobytes()


async def test_a_mel_is_read_once():
    outlet = MelOutlet(StoredMels(), Turn(id="s.1"), ("{0}", "t"))
    chunk = Reads(Chunk(speech=Speech(pcm=SOUND, mel=bytes(16000))))
    await outlet.take(chunk)
    await outlet.close(over=False)
    assert chunk.counts == {"mel": 1}


class StoredMels:
    async def put(self, key, mel):
        assert len(mel) == 16000


@pytest.mark.parametrize(
    ("form", "most"),
    [
        (NATIVE, 1),  # the bytes that came are the bytes that go
        (AudioFormat(encoding=ENCODING_MULAW, sample_rate=24000), 1 + 2 + 2 + 1),  # read, samples, scaled, words
    ],
    ids=["native", "mu-law"],
)
def test_speech_in_the_callers_format(form, most):
    speech = Speech(sample_rate=24000, pcm=SOUND)
    reads = Reads(speech)
    data = OutputSound(form).feed(reads, final=False)
    assert reads.counts == {"pcm": 1}
    assert (data == SOUND) == (form is NATIVE)
    _, found = held(lambda: OutputSound(form).feed(speech, final=False), len(SOUND))
    assert found < most + SLACK


def test_an_event_of_speech_is_filled_in_place(in_place):
    in_place(following, "TurnEvent")
    one = Following(None, Turn(id="s.1"))
    one._count_playback = lambda: None
    event = one._audio(Chunk(speech=Speech(sample_rate=24000, pcm=SOUND)))
    assert event.audio.data == SOUND
