"""One recording, both streams: semantic codes and continuous features of equal length, encoded together.

Segments are independent of each other, so those of any recordings may share an evaluation. On a GPU they do, and the
two encoders, which share nothing, run on a stream each. On a CPU a batch takes no less time than its segments one by
one (benchmarks/RESULTS.md), so each is evaluated alone: its numbers are the same bit by bit, whoever is beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kimia.errors import ConfigError
from kimia.model.audio import BATCH_SEGMENTS, Segment, cut
from kimia.model.checkpoint import Checkpoint
from kimia.model.config import EncoderConfig, FeatureConfig, exact_div
from kimia.model.vq import VQTokenizer, load_vq
from kimia.model.whisper import WhisperFeatures, load_whisper

SEGMENTS_AT_ONCE = {"cuda": BATCH_SEGMENTS, "cpu": 1}  # of one evaluation

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class EncodedAudio:
    """What the language model reads of one audio message, 12.5 positions per second in the release."""

    codes: tuple[int, ...]  # semantic codes, without the vocabulary offset
    features: Tensor  # (N, F)


class AudioEncoder:
    """The VQ tokenizer and the Whisper encoder side by side."""

    def __init__(self, vq: VQTokenizer, whisper: WhisperFeatures) -> None:
        self.vq = vq
        self.whisper = whisper
        _check_alike(vq, whisper)
        self._beside: torch.cuda.Stream | None = None  # of the VQ tokenizer

    @property
    def device(self) -> torch.device:
        """Where both encoders are."""
        return self.vq.codebook.weight.device

    @property
    def features(self) -> FeatureConfig:
        """What both encoders read: rate, segments, mel."""
        return self.vq.features

    @property
    def sample_rate(self) -> int:
        """Rate in Hz of the waveforms that both encoders read."""
        return self.vq.features.sample_rate

    @property
    def samples_per_position(self) -> int:
        """Samples behind one code and one feature."""
        return self.vq.samples_per_token

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, feature_width: int, device: torch.device | str, dtype: torch.dtype
    ) -> AudioEncoder:
        """Load both encoders; `feature_width` is the language model's kimia_adaptor_input_dim.

        `dtype` is that of the Whisper encoder; codes are always computed in float32, as in the release.
        """
        width = EncoderConfig.read(checkpoint.whisper / "config.json").d_model
        group = exact_div(feature_width, width, f"{checkpoint.root}: kimia_adaptor_input_dim / Whisper's d_model")
        return cls(load_vq(checkpoint.vq_tokenizer, device), load_whisper(checkpoint.whisper, group, device, dtype))

    def encode(self, waves: Sequence[np.ndarray]) -> list[EncodedAudio]:
        """Encode waveforms (S,), float32 at `sample_rate`; N = ceil(S / samples_per_position) positions each.

        The result does not depend on what else is in the call. Raises AudioError for empty or malformed waveforms.
        """
        return [joined(pieces) for pieces in self._by_segments(waves, self.encode_segments)]

    def codes(self, waves: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
        """The semantic codes of waveforms alone; as `encode`."""
        of_waves = self._by_segments(waves, self.codes_of_segments)
        return [tuple(code for codes in pieces for code in codes) for pieces in of_waves]

    # ---- segments ----

    def cut(self, wave: np.ndarray) -> list[Segment]:
        """The segments of a waveform (S,). Raises AudioError when it is empty or malformed."""
        return cut(wave, self.vq.features.segment_samples)

    def encode_segments(self, batch: Sequence[Segment]) -> list[EncodedAudio]:
        """Both streams of each segment, all in one evaluation."""
        codes, features = self._both(batch) if self.device.type == "cuda" else self._one_by_one(batch)
        return [EncodedAudio(tuple(ids.tolist()), rows) for ids, rows in zip(codes, features, strict=True)]

    def codes_of_segments(self, batch: Sequence[Segment]) -> list[tuple[int, ...]]:
        """The semantic codes of each segment, all in one evaluation."""
        return [tuple(ids.tolist()) for ids in self.vq.encode_segments(batch)]

    def _by_segments(
        self, waves: Sequence[np.ndarray], encode: Callable[[Sequence[Segment]], Sequence[R]]
    ) -> Iterator[list[R]]:
        """What is made of the segments of each waveform, as many evaluated together as the device gains from."""
        cuts = [self.cut(wave) for wave in waves]
        pieces = [piece for of_wave in cuts for piece in of_wave]
        most = SEGMENTS_AT_ONCE[self.device.type]
        encoded = iter([one for at in range(0, len(pieces), most) for one in encode(pieces[at : at + most])])
        return ([next(encoded) for _ in of_wave] for of_wave in cuts)

    def _one_by_one(self, batch: Sequence[Segment]) -> tuple[list[Tensor], list[Tensor]]:
        return self.vq.encode_segments(batch), self.whisper.encode_segments(batch)

    def _both(self, batch: Sequence[Segment]) -> tuple[list[Tensor], list[Tensor]]:
        """The same, the VQ tokenizer beside Whisper on a stream of its own."""
        here = torch.cuda.current_stream(self.device)
        self._beside = self._beside or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._beside.wait_stream(here)  # the weights may still be on their way
        with torch.cuda.stream(self._beside):
            codes = self.vq.encode_segments(batch)
        features = self.whisper.encode_segments(batch)
        here.wait_stream(self._beside)
        for ids in codes:
            ids.record_stream(here)  # else their memory is used again while they are read here
        return codes, features


def joined(pieces: Sequence[EncodedAudio]) -> EncodedAudio:
    """The segments of one recording, in order, as one."""
    codes = tuple(code for piece in pieces for code in piece.codes)
    return EncodedAudio(codes, torch.cat([piece.features for piece in pieces]))


def _check_alike(vq: VQTokenizer, whisper: WhisperFeatures) -> None:
    """Both streams must have a position for the same samples."""
    for what, of_vq, of_whisper in (
        ("sampling_rate", vq.features.sample_rate, whisper.features.sample_rate),
        ("segment samples", vq.features.segment_samples, whisper.features.segment_samples),
        ("samples per position", vq.samples_per_token, whisper.samples_per_feature),
    ):
        if of_vq != of_whisper:
            raise ConfigError(
                f"{what}: {of_vq} in the VQ tokenizer, {of_whisper} in the Whisper encoder; they must agree"
            )
