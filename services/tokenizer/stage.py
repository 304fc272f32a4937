"""The tokenizer stage: clips in, stretches of semantic tokens and continuous features out.

A clip is encoded as soon as it is complete, in the order in which clips end in the log. Features are computed only for
what the model hears; spoken history needs its codes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence

import numpy as np

from kimia.clips import Sound, wanted_sounds
from kimia.compute import FEATURE_TYPES, ComputeThread, cut_off, feature_bytes, open_model, replayed
from kimia.errors import AudioError, ConversationError
from kimia.model.audio import load_audio, prepare_waveform
from kimia.model.encode import AudioEncoder
from kimia.model.prompt import Encoded as EncodedClip
from kimia.pipeline import CodesOnly
from kimia.runtime.settings import Settings
from kimia.sound import check_format, decode
from kimia.stage import TOKENIZER, StageKind
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.turn_pb2 import Chunk, Encoded, InputAudio, StageReport, Turn
from services.tokenizer.fingerprint import fingerprint

STRETCH = 12  # positions of a chunk, about a second


class TokenizerStage:
    """Both encoders of one checkpoint. `fingerprint` names all that the features depend on besides the sound."""

    kind: StageKind = TOKENIZER

    def __init__(self, encoder: AudioEncoder, compute: ComputeThread, fingerprint: str = "") -> None:
        self.encoder = encoder
        self.compute = compute
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, settings: Settings) -> TokenizerStage:
        """Load the encoders of the settings' checkpoint. Raises CheckpointError, ParameterError."""
        place = open_model(settings)
        width = place.configs.lm.adaptor_input_dim
        encoder = AudioEncoder.load(place.checkpoint, width, place.device, place.dtype)
        folders = (place.checkpoint.whisper, place.checkpoint.vq_tokenizer)
        name = fingerprint(folders, str(width), str(place.dtype))
        return cls(encoder, ComputeThread(settings.threads), name)

    async def warm_up(self) -> None:
        """Encode a second of silence."""
        clip = Clip(format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000))
        turn = Turn(messages=[Message(role=ROLE_USER, audio=clip)])
        silence = Chunk(final=True, input=InputAudio(data=bytes(32000), clip_end=True))
        async for _ in self.run(turn, replayed(silence)):
            pass

    async def run(
        self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()
    ) -> AsyncIterator[Chunk]:
        """Encode every clip of the inbox; those given out as a whole already are not encoded again.

        Raises AudioError, naming the message, for sound that is bad or lacking; ConversationError for a clip that no
        message has; StateError when the inbox ends too early.
        """
        if published and published[-1].final:
            return
        compute = self.compute.turn()
        gathering = Gathering(wanted_sounds(turn.messages))
        told = Counter(chunk.encoded.clip for chunk in published)
        whole = {chunk.encoded.clip for chunk in published if chunk.encoded.clip_end}
        index = len(published)
        async for chunk in inbox:
            clip = gathering.take(chunk)
            written = []
            if clip is not None and clip[0].clip.number not in whole:
                pieces = await compute.run(self._encode, *clip)
                written = [Chunk(encoded=piece) for piece in pieces[told[clip[0].clip.number] :]]
            if chunk.final:
                gathering.check_complete()
                written = _closed(written, StageReport(compute_seconds=compute.seconds, units=gathering.complete))
            for out in written:
                out.index, index = index, index + 1
                yield out
            if chunk.final:
                return
        raise cut_off("input")

    def _encode(self, sound: Sound, data: bytes) -> list[Encoded]:
        """The stretches of one clip. Raises AudioError that names the message, RequestError for a wrong format."""
        try:
            wave = read_wave(sound, data, self.encoder.sample_rate)
            return stretches(sound.clip.number, self._encoded(wave, sound.heard))
        except AudioError as error:
            raise AudioError(str(error), sound.index) from error

    def _encoded(self, wave: np.ndarray, heard: bool) -> EncodedClip:
        if heard:
            return self.encoder.encode([wave])[0]
        return CodesOnly(tuple(self.encoder.vq.encode([wave])[0].tolist()))


class Gathering:
    """The sound of a turn as it arrives, clip by clip."""

    def __init__(self, sounds: Mapping[int, Sound]) -> None:
        self._sounds = sounds
        self._parts: dict[int, list[bytes]] = {}
        self._ended: set[int] = set()

    @property
    def complete(self) -> int:
        """Clips that have ended."""
        return len(self._ended)

    def take(self, chunk: Chunk) -> tuple[Sound, bytes] | None:
        """Store a piece; the clip that it ends with all its bytes, if any. Raises ConversationError, AudioError."""
        if not chunk.HasField("input"):
            return None
        number = chunk.input.clip
        if number not in self._sounds:
            raise ConversationError(f"sound came for clip {number}, which no message has; send what the turn names")
        sound = self._sounds[number]
        if number in self._ended:
            raise AudioError("sound came after the end of its clip", sound.index)
        self._parts.setdefault(number, []).append(chunk.input.data)
        if not chunk.input.clip_end:
            return None
        self._ended.add(number)
        return sound, b"".join(self._parts.pop(number))

    def check_complete(self) -> None:
        """Raise AudioError when a clip has begun but not ended, or never came although it must be encoded."""
        for number, sound in self._sounds.items():
            if number in self._ended:
                continue
            if number in self._parts:
                raise AudioError("its sound was cut off; mark the last piece as clip_end", sound.index)
            if sound.must_be_encoded:
                raise AudioError("its sound never came", sound.index)


def read_wave(sound: Sound, data: bytes, rate: int) -> np.ndarray:
    """Mono samples (S,) float32 at `rate` Hz of a clip's bytes. Raises AudioError, RequestError for a wrong format."""
    form = sound.clip.format
    kind = "audio" if sound.heard else "spoken.clip"
    check_format(form, f"messages[{sound.index}].{kind}.format", files=True)
    if not data:
        raise AudioError("the clip is empty (0 bytes)")
    if form.encoding == ENCODING_FILE:
        return load_audio(data, rate)
    return prepare_waveform(decode(data, form), form.sample_rate, rate)


def stretches(number: int, encoded: EncodedClip) -> list[Encoded]:
    """A clip of N positions as ceil(N / STRETCH) pieces."""
    pieces = []
    for start in range(0, len(encoded.codes), STRETCH):
        end = start + STRETCH
        piece = Encoded(clip=number, codes=encoded.codes[start:end], clip_end=end >= len(encoded.codes))
        if encoded.features is not None:
            rows = encoded.features[start:end]
            piece.features, piece.feature_type = feature_bytes(rows), FEATURE_TYPES[rows.dtype]
            piece.feature_width = rows.shape[1]
        pieces.append(piece)
    return pieces


def _closed(chunks: list[Chunk], report: StageReport) -> list[Chunk]:
    """The chunks, or an empty one, with the report on the last."""
    closed = chunks or [Chunk()]
    closed[-1].final = True
    closed[-1].report.CopyFrom(report)
    return closed
