"""Speech in the caller's format: chunk n of the log `audio` in, piece n out.

A pure function of the log from its beginning, so that whoever resumes a turn derives the same pieces again.
"""

from __future__ import annotations

import numpy as np
import soxr

from kimia.sound import decode, encode
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat
from kimia.v1.turn_pb2 import Speech

NATIVE_RATE = 24_000  # Hz, where the caller names no format
NATIVE = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=NATIVE_RATE)  # decoded at whatever rate it has


def output_format(wanted: AudioFormat) -> AudioFormat:
    """The format that a caller gets: the one wanted, or signed 16-bit PCM at 24 kHz."""
    if wanted.encoding:
        return wanted
    return AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=NATIVE_RATE)


class OutputSound:
    """The speech of one turn in another format. Feed it the whole log, in order."""

    def __init__(self, form: AudioFormat) -> None:
        self.form = form
        self.samples = 0  # given out so far, at the output rate
        self._rate = 0  # of the speech
        self._resampler: soxr.ResampleStream | None = None

    def feed(self, speech: Speech, final: bool) -> bytes:
        """What this chunk adds; with the final one everything that the resampler held back. May be empty."""
        rate = speech.sample_rate or self._rate or self.form.sample_rate
        pcm = speech.pcm  # read once: each look at a field of bytes copies it
        if rate == self.form.sample_rate and self.form.encoding == ENCODING_PCM_S16LE:
            self.samples += len(pcm) // 2
            return pcm
        resampled = self._resample(decode(pcm, NATIVE), rate, final)
        self.samples += len(resampled)
        return encode(resampled, self.form)

    def _resample(self, samples: np.ndarray, rate: int, final: bool) -> np.ndarray:
        """(S,) float32 at `rate` to (S',) float32 at the output rate."""
        if rate == self.form.sample_rate:
            return samples
        if self._resampler is None:
            self._rate = rate
            self._resampler = soxr.ResampleStream(rate, self.form.sample_rate, 1, dtype="float32")
        resampled: np.ndarray = self._resampler.resample_chunk(samples, last=final)
        return resampled
