"""All configs of one checkpoint, and the rules that tie its parts together.

The parts are released and trained apart, so each config may be valid and the whole still useless: a codebook of
another size, features of another width. Such a mix is refused before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimia.errors import ConfigError
from kimia.model.checkpoint import Checkpoint
from kimia.model.config import (
    ENCODER_STRIDE,
    EncoderConfig,
    FeatureConfig,
    FlowConfig,
    LMConfig,
    VocoderConfig,
    VQConfig,
    check_features,
    exact_div,
)


@dataclass(frozen=True)
class ModelConfigs:
    """Every config of a checkpoint; the detokenizer's two are None where it was not asked for."""

    lm: LMConfig
    vq: VQConfig
    vq_features: FeatureConfig
    whisper: EncoderConfig
    whisper_features: FeatureConfig
    flow: FlowConfig | None
    vocoder: VocoderConfig | None

    @property
    def samples_per_token(self) -> int:
        """Input samples of one semantic token."""
        return self.vq_features.hop * ENCODER_STRIDE * self.vq.pooling_kernel


def read_configs(checkpoint: Checkpoint, *, detokenizer: bool = True) -> ModelConfigs:
    """Read and cross-check all configs; without `detokenizer` its files are never opened.

    Raises CheckpointError for an absent file, ConfigError for an invalid one and for parts that do not fit together.
    """
    root, vq = checkpoint.root, checkpoint.vq_tokenizer
    configs = ModelConfigs(
        lm=LMConfig.read(root / "config.json"),
        vq=VQConfig.read(vq / "config.json"),
        vq_features=FeatureConfig.read(vq / "preprocessor_config.json"),
        whisper=EncoderConfig.read(checkpoint.whisper / "config.json"),
        whisper_features=FeatureConfig.read(checkpoint.whisper / "preprocessor_config.json"),
        flow=FlowConfig.read(checkpoint.flow / "config.yaml") if detokenizer else None,
        vocoder=VocoderConfig.read(checkpoint.vocoder / "config.json") if detokenizer else None,
    )
    check_consistency(configs, checkpoint)
    return configs


def check_consistency(configs: ModelConfigs, checkpoint: Checkpoint) -> None:
    """Raise ConfigError, naming both files and both values, unless the parts speak of the same tokens and mels."""
    _check_encoders(configs, checkpoint)
    _check_streams(configs, checkpoint)
    if configs.flow is not None and configs.vocoder is not None:
        _check_detokenizer(configs.lm, configs.flow, configs.vocoder, checkpoint)


def _check_encoders(configs: ModelConfigs, checkpoint: Checkpoint) -> None:
    for folder, encoder, features in (
        (checkpoint.vq_tokenizer, configs.vq.encoder, configs.vq_features),
        (checkpoint.whisper, configs.whisper, configs.whisper_features),
    ):
        check_features(encoder, features, f"{folder / 'config.json'}", f"{folder / 'preprocessor_config.json'}")


def _check_streams(configs: ModelConfigs, checkpoint: Checkpoint) -> None:
    lm, whisper = f"{checkpoint.root / 'config.json'}", checkpoint.whisper
    vq = checkpoint.vq_tokenizer
    _equal(
        f"{vq / 'preprocessor_config.json'}: sampling_rate",
        configs.vq_features.sample_rate,
        f"{whisper / 'preprocessor_config.json'}: sampling_rate",
        configs.whisper_features.sample_rate,
    )
    _equal(
        f"{vq / 'config.json'}: quantize_vocab_size",
        configs.vq.codebook_size,
        f"{lm}: vocab_size - kimia_token_offset",
        configs.lm.audio_codes,
    )
    what = f"{lm}: kimia_adaptor_input_dim / {whisper / 'config.json'}: d_model"
    group = exact_div(configs.lm.adaptor_input_dim, configs.whisper.d_model, what)
    _equal(
        f"{vq / 'config.json'}: samples per token (hop_length x stride x pooling_kernel_size)",
        configs.samples_per_token,
        f"{whisper / 'config.json'}: samples per feature (hop_length x stride x {lm}: adaptor_input_dim / d_model)",
        configs.whisper_features.hop * ENCODER_STRIDE * group,
    )


def _check_detokenizer(lm: LMConfig, flow: FlowConfig, vocoder: VocoderConfig, checkpoint: Checkpoint) -> None:
    flow_file, vocoder_file = f"{checkpoint.flow / 'config.yaml'}", f"{checkpoint.vocoder / 'config.json'}"
    _equal(
        f"{flow_file}: semantic_vocab_size",
        flow.audio_codes,
        f"{checkpoint.root / 'config.json'}: vocab_size - kimia_token_offset",
        lm.audio_codes,
    )
    _equal(f"{flow_file}: input_size", flow.mel_bins, f"{vocoder_file}: num_mels", vocoder.mel_bins)


def _equal(name: str, value: int, other_name: str, other: int) -> None:
    if value != other:
        raise ConfigError(f"the parts do not fit together: {name} is {value}, {other_name} is {other}")
