"""One recording, both streams: semantic codes and continuous features of equal length, encoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimia.errors import ConfigError
from kimia.model.checkpoint import Checkpoint
from kimia.model.config import EncoderConfig, exact_div
from kimia.model.vq import VQTokenizer, load_vq
from kimia.model.whisper import WhisperFeatures, load_whisper


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
        pairs = zip(self.vq.encode(waves), self.whisper.encode(waves), strict=True)
        return [EncodedAudio(tuple(codes.tolist()), features) for codes, features in pairs]


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
