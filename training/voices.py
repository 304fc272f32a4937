"""Voices that read the texts: synthesis front ends behind one call, with their sound kept on disk.

The speaking voice is hibari's; it alone is what the micro checkpoint learns to speak with. All others only ask
questions. Voices with `seen=False` are never trained on: they judge whether a new caller is understood.

Notes
- hibari (PyPI hibari-tts 0.2.1, Apache-2.0) speaks at 24 kHz; flite 2.2, espeak-ng 1.51 and festival 2.5 are
  Debian's programs. None is needed by the services, and none of their sound is in the repository.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from kimia.errors import AudioError, ParameterError
from kimia.model.writing import whole_file

SPEECH_RATE = 24_000  # Hz, of the speaking voice and the vocoder
HEARING_RATE = 16_000  # Hz, of both encoders
TIMEOUT = 60.0  # seconds that a program may take over one sentence
CACHE_FORMAT = "FLAC"


@dataclass(frozen=True)
class Voice:
    """One way to speak."""

    name: str
    engine: str
    argument: str = ""  # the engine's own name of the voice
    pitch: int = 50  # espeak-ng only, 0..99
    speed: int = 165  # espeak-ng only, words a minute
    seen: bool = True  # trained on

    @property
    def key(self) -> str:
        """What its sound depends on, besides the text."""
        return f"{self.engine}/{self.argument}/{self.pitch}/{self.speed}"


def _espeak(argument: str, pitch: int, speed: int, *, seen: bool = True) -> Voice:
    return Voice(f"espeak-{argument}-{pitch}-{speed}", "espeak-ng", argument, pitch, speed, seen)


SPEAKER = Voice("hibari", "hibari", "heart")
CALLERS = (
    Voice("flite-slt", "flite", "slt"),
    Voice("flite-awb", "flite", "awb"),
    Voice("flite-kal16", "flite", "kal16"),
    _espeak("en-us", 45, 160),
    _espeak("en-us+f3", 60, 170),
    _espeak("en-us+m3", 40, 150),
    _espeak("en-gb", 50, 165),
    _espeak("en-gb-x-rp+f2", 55, 155),
    _espeak("en-us+Annie", 50, 160),
    _espeak("en-us+klatt4", 45, 165),
    _espeak("en-us+steph3", 55, 175),
    _espeak("en-gb-scotland+m7", 40, 160),
)
STRANGERS = (
    Voice("flite-rms", "flite", "rms", seen=False),
    Voice("festival-ked", "festival", "ked_diphone", seen=False),
    _espeak("en-us+f5", 50, 160, seen=False),
    _espeak("en-gb+michael", 45, 160, seen=False),
)
VOICES = (SPEAKER, *CALLERS, *STRANGERS)
BY_NAME = {voice.name: voice for voice in VOICES}

QUESTION_WORDS = ("what", "when", "where", "how", "is", "are", "can", "could", "do", "has", "which")


def punctuated(text: str) -> str:
    """As a front end likes it: a question mark where a question word stands, else a full stop."""
    return text + ("?" if any(f" {word} " in f" {text} " for word in QUESTION_WORDS) else ".")


# ---- engines ----------------------------------------------------------------------------------------------------


def _run(command: list[str], text: str | None = None) -> bytes:
    try:
        done = subprocess.run(
            command, input=None if text is None else text.encode(), capture_output=True, timeout=TIMEOUT, check=True
        )
    except FileNotFoundError as error:
        raise AudioError(f"{command[0]}: not installed; apt-get install {command[0]}") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise AudioError(f"{command[0]}: could not speak ({error}); try the command by hand") from error
    return done.stdout


def _decoded(data: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: gave no sound ({error.error_string})") from error
    return samples, rate


def _speak_flite(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    return _decoded(_run(["flite", "-voice", voice.argument, "-t", text, "-o", "/dev/stdout"]), "flite")


def _speak_espeak(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    options = ["-v", voice.argument, "-p", str(voice.pitch), "-s", str(voice.speed), "--stdout"]
    return _decoded(_run(["espeak-ng", *options, text]), "espeak-ng")


def _speak_festival(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:  # its header needs a file that can be searched
        _run(["text2wave", "-eval", f"(voice_{voice.argument})", "-o", file.name], text)
        return _decoded(Path(file.name).read_bytes(), "festival")


@lru_cache(maxsize=1)
def _hibari() -> Any:
    if importlib.util.find_spec("hibari") is None:
        raise AudioError("hibari: not installed; pip install 'kimia[training]'")
    import hibari  # type: ignore[import-not-found, unused-ignore]

    return hibari.Hibari()


def _speak_hibari(voice: Voice, text: str) -> tuple[np.ndarray, int]:  # noqa: ARG001 (one voice, in the package)
    return np.asarray(_hibari()(text, seed=0), np.float32), SPEECH_RATE


ENGINES: dict[str, Callable[[Voice, str], tuple[np.ndarray, int]]] = {
    "hibari": _speak_hibari,
    "flite": _speak_flite,
    "espeak-ng": _speak_espeak,
    "festival": _speak_festival,
}
PROGRAMS = {"flite": "flite", "espeak-ng": "espeak-ng", "festival": "text2wave"}


def is_installed(voice: Voice) -> bool:
    """Can this voice speak here?"""
    if voice.engine == "hibari":
        return importlib.util.find_spec("hibari") is not None
    return shutil.which(PROGRAMS[voice.engine]) is not None


def synthesize(voice: Voice, text: str) -> np.ndarray:
    """Speech (S,) float32 at SPEECH_RATE, peak below 1. Raises AudioError, ParameterError for an unknown engine."""
    if voice.engine not in ENGINES:
        raise ParameterError(f"voice {voice.name}: engine must be one of {', '.join(ENGINES)}, got {voice.engine!r}")
    samples, rate = ENGINES[voice.engine](voice, punctuated(text))
    wave = samples if rate == SPEECH_RATE else soxr.resample(samples, rate, SPEECH_RATE, quality="HQ")
    if not len(wave) or not np.isfinite(wave).all():
        raise AudioError(f"voice {voice.name}: gave no usable sound for {text!r}")
    return (0.9 * wave / max(0.9, float(np.abs(wave).max()))).astype(np.float32)


# ---- on disk ----------------------------------------------------------------------------------------------------


class Cache:
    """Sound that was made once, one file per voice and text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, voice: Voice, text: str) -> Path:
        """Where the sound lies, or will."""
        digest = hashlib.sha256(f"{voice.key}/{text}".encode()).hexdigest()
        return self.folder / voice.name / f"{digest[:20]}.flac"

    def speech(self, voice: Voice, text: str) -> np.ndarray:
        """Speech (S,) float32 at SPEECH_RATE, made if it is not there yet. Raises AudioError."""
        path = self.path(voice, text)
        if not path.exists():
            wave = synthesize(voice, text)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                soundfile.write(partial, wave, SPEECH_RATE, "PCM_16", format=CACHE_FORMAT)
        return _read(path)


def _read(path: Path) -> np.ndarray:
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be read ({error.error_string}); delete it and it is made again") from error
    if rate != SPEECH_RATE or samples.ndim != 1 or not len(samples):
        raise AudioError(f"{path}: is no mono speech at {SPEECH_RATE} Hz; delete it and it is made again")
    return np.asarray(samples)
