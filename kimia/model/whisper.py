"""Continuous features: the Whisper encoder, `group` consecutive 50 Hz frames laid end to end as one feature.

The network is `transformers`' own encoder, filled strictly from the release's tensors. Each 30 s segment is padded
with zeros to its full length and attended as a whole, padding included: that is what the language model was trained
on, so a short recording costs as much as a long one, and segments of any requests may share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimia.errors import ConfigError
from kimia.model.audio import BATCH_SEGMENTS, LogMel, Segment, cut
from kimia.model.checkpoint import Source, load_strict, sharded_source, without, without_prefix
from kimia.model.config import ENCODER_STRIDE, EncoderConfig, FeatureConfig, check_features, exact_div
from kimia.model.quiet import quiet

ENCODER_PREFIXES = ("model.encoder.", "encoder.")  # the release's layout, and that of an exported WhisperModel
NOT_ENCODER = (r"^(model\.)?decoder\.", r"^proj_out\.")


class WhisperFeatures(nn.Module):
    """Whisper encoder, mel and grouping. Parameters are empty (meta device) until loaded."""

    def __init__(self, config: EncoderConfig, features: FeatureConfig, group: int) -> None:
        super().__init__()
        check_features(config, features)
        if features.segment_samples != ENCODER_STRIDE * features.hop * config.max_positions:
            raise ConfigError("Whisper attends whole segments: max_source_positions must equal their 50 Hz frames")
        exact_div(config.max_positions, group, "Whisper frames of a segment / frames of a feature")
        self.features = features
        self.group = group
        self.width = group * config.d_model
        self.samples_per_feature = ENCODER_STRIDE * features.hop * group
        self.log_mel = LogMel(features)
        with torch.device("meta"):
            self.encoder: Any = _build(config)

    @torch.no_grad()
    def encode(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """Features (N, group * d_model) of each waveform (S,), N = ceil(S / samples_per_feature).

        Raises AudioError for a waveform that is empty or no float32 array.
        """
        cuts = [cut(wave, self.features.segment_samples) for wave in waves]
        pieces = [piece for of_wave in cuts for piece in of_wave]
        encoded = [
            features
            for start in range(0, len(pieces), BATCH_SEGMENTS)
            for features in self.encode_segments(pieces[start : start + BATCH_SEGMENTS])
        ]
        remaining = iter(encoded)
        return [torch.cat([next(remaining) for _ in of_wave]) for of_wave in cuts]

    @torch.no_grad()
    def encode_segments(self, batch: Sequence[Segment]) -> list[Tensor]:
        """Features (N, group * d_model) of each segment, all in one evaluation."""
        weight = self.encoder.conv1.weight
        mels = [self.log_mel(piece.samples, self.features.segment_samples) for piece in batch]
        mel = torch.from_numpy(np.stack(mels))  # (B, M, T)
        states: Tensor = self.encoder(mel.to(weight.device, weight.dtype)).last_hidden_state  # (B, T/2, d)
        grouped = states.reshape(len(batch), -1, self.width)  # (B, T/2/group, group*d)
        counts = [-(-len(piece.samples) // self.samples_per_feature) for piece in batch]
        return [row[:count] for row, count in zip(grouped, counts, strict=True)]


def load_whisper(folder: Path, group: int, device: torch.device | str, dtype: torch.dtype) -> WhisperFeatures:
    """Load the encoder of a Whisper folder; `group` is the number of 50 Hz frames of a feature (4 in the release).

    Accepts any storage dtype, one file or shards; decoder tensors are ignored. Raises CheckpointError.
    """
    module = WhisperFeatures(
        EncoderConfig.read(folder / "config.json"), FeatureConfig.read(folder / "preprocessor_config.json"), group
    )
    load_strict(module.encoder, encoder_source(folder), str(folder), device=device, dtype=dtype)
    return module


def encoder_source(folder: Path) -> Source:
    """The tensors of a Whisper-like encoder, unprefixed; only decoder tensors are left out."""
    return without_prefix(without(sharded_source(folder), *NOT_ENCODER), *ENCODER_PREFIXES)


def whisper_config(config: EncoderConfig) -> Any:
    """The same encoder in the words of `transformers` (no dropout, SDPA attention)."""
    from transformers.models.whisper.configuration_whisper import WhisperConfig

    return WhisperConfig(
        d_model=config.d_model,
        encoder_layers=config.layers,
        encoder_attention_heads=config.heads,
        encoder_ffn_dim=config.ffn_dim,
        num_mel_bins=config.mel_bins,
        max_source_positions=config.max_positions,
        activation_function=config.activation,
        scale_embedding=config.scale_embedding,
        dropout=0.0,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )


def _build(config: EncoderConfig) -> nn.Module:
    with quiet():
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(whisper_config(config))
