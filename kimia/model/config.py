"""The config files of a released checkpoint as frozen dataclasses.

Every dimension is required: upstream's class defaults differ from the released values (delay 5 instead of 6, say),
so a missing one is an error that names the file and the field, never a guess. Switches that a file leaves out take
upstream's defaults.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kimia.errors import CheckpointError, ConfigError

MISSING = object()

DIMENSION_LIMIT = 2**24  # no model comes near, and a matrix of such sides still has countable bytes
DEPTH_LIMIT = 2**12  # of layers, and of a vocoder's kernels, rates and dilations
ENCODER_STRIDE = 2  # mel frames per encoder frame: the second convolution's stride
UNLIMITED = 2**31 - 1  # positions of a model without a position table


class Fields:
    """The fields of one config file, read with their types; every complaint names file and field."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is MISSING:
            raise ConfigError(f"{self.source}: field {name!r} is missing")
        return value

    def _wrong(self, name: str, expected: str) -> ConfigError:
        value = self.values.get(name)
        return ConfigError(f"{self.source}: field {name!r} must be {expected}, got {_brief(value)}")

    def integer(self, name: str, default: Any = MISSING, *, minimum: int = 1, maximum: int = DIMENSION_LIMIT) -> int:
        """An integer of at least `minimum` and at most `maximum`."""
        value = self._get(name, default)
        if not _is_integer(value) or value < minimum:
            raise self._wrong(name, f"an integer of at least {minimum}")
        if value > maximum:
            raise self._wrong(name, f"an integer of at most {maximum}")
        return int(value)

    def number(self, name: str, default: Any = MISSING, *, positive: bool = False) -> float:
        """A finite number, above zero where `positive`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise self._wrong(name, "a finite number")
        if positive and value <= 0:
            raise self._wrong(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: Any = MISSING) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def choice(self, name: str, allowed: tuple[Any, ...], default: Any = MISSING) -> Any:
        """One of the values that this program implements."""
        value = self._get(name, default)
        if value not in allowed:
            raise self._wrong(name, "one of " + ", ".join(repr(item) for item in allowed))
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A non-empty list of positive integers: kernels, rates."""
        value = self._get(name, MISSING)
        if not _are_counts(value):
            raise self._wrong(name, f"a non-empty list of integers from 1 to {DEPTH_LIMIT}")
        return tuple(value)

    def integer_lists(self, name: str) -> tuple[tuple[int, ...], ...]:
        """A non-empty list of non-empty lists of positive integers: dilations."""
        value = self._get(name, MISSING)
        if not isinstance(value, list) or not value or not all(map(_are_counts, value)):
            raise self._wrong(name, f"a non-empty list of non-empty lists of integers from 1 to {DEPTH_LIMIT}")
        return tuple(map(tuple, value))

    def section(self, name: str, default: Any = MISSING) -> Fields:
        """A nested mapping."""
        value = self._get(name, default)
        if not isinstance(value, dict):
            raise self._wrong(name, "a mapping")
        return Fields(f"{self.source}: {name}", value)


def _brief(value: object) -> str:
    """A wrong value, which may fill pages, in one line."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_counts(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(_is_integer(item) and 0 < item <= DEPTH_LIMIT for item in value)
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError when it cannot be opened, ConfigError when it is no JSON."""
    text = _read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ConfigError(f"{path}: cannot be parsed as JSON ({error}); is the file complete?") from error


def _read_yaml(path: Path) -> Any:
    text = _read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be parsed as YAML ({error}); is the file complete?") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error


def read_fields(path: Path) -> Fields:
    """Read a JSON or YAML config file. Raises CheckpointError when absent, ConfigError when not a mapping."""
    values = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping")
    return Fields(str(path), values)


def exact_div(value: int, divisor: int, what: str) -> int:
    """value / divisor, refusing a remainder with a ConfigError that says what was divided."""
    if value % divisor:
        raise ConfigError(f"{what}: {value} is not a multiple of {divisor}")
    return value // divisor


@dataclass(frozen=True)
class LMConfig:
    """`config.json` of the language model."""

    vocab_size: int  # text ids, special ids, then audio codes
    hidden_size: int
    intermediate_size: int
    layers: int  # main trunk (num_hidden_layers)
    heads: int
    kv_heads: int
    max_positions: int  # max_position_embeddings
    rms_norm_eps: float
    rope_theta: float
    mimo_layers: int  # layers of the audio branch (kimia_mimo_layers)
    fork_layer: int  # the audio branch starts after this layer (0-based, kimia_mimo_transformer_from_layer_index)
    audio_delay: int  # steps by which text leads audio (kimia_mimo_audiodelaytokens)
    token_offset: int  # id of audio code 0 (kimia_token_offset)
    adaptor_input_dim: int  # width of a continuous feature (kimia_adaptor_input_dim)
    media_begin: int
    media_end: int
    pad_token: int
    random_weights: bool = False  # says that the folder was made by `kimia checkpoint new`, not trained

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def audio_codes(self) -> int:
        """Number of semantic codes. (kimia_audio_output_vocab promises more rows than the matrix has.)"""
        return self.vocab_size - self.token_offset

    @classmethod
    def read(cls, path: Path) -> LMConfig:
        """Read and check `config.json`."""
        fields = read_fields(path)
        fields.choice("hidden_act", ("silu",), default="silu")
        fields.choice("rope_scaling", (None,), default=None)
        fields.choice("tie_word_embeddings", (False,), default=False)
        fields.choice("use_whisper_feature", (True,), default=True)
        config = cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            layers=fields.integer("num_hidden_layers", maximum=DEPTH_LIMIT),
            heads=fields.integer("num_attention_heads"),
            kv_heads=fields.integer("num_key_value_heads"),
            max_positions=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps", positive=True),
            rope_theta=fields.number("rope_theta", positive=True),
            mimo_layers=fields.integer("kimia_mimo_layers", maximum=DEPTH_LIMIT),
            fork_layer=fields.integer("kimia_mimo_transformer_from_layer_index", minimum=0),
            audio_delay=fields.integer("kimia_mimo_audiodelaytokens", minimum=0),
            token_offset=fields.integer("kimia_token_offset"),
            adaptor_input_dim=fields.integer("kimia_adaptor_input_dim"),
            media_begin=fields.integer("kimia_media_begin", minimum=0),
            media_end=fields.integer("kimia_media_end", minimum=0),
            pad_token=fields.integer("pad_token_id", minimum=0),
            random_weights=fields.flag("kimia_random_weights", default=False),
        )
        config._check(str(path))
        return config

    def _check(self, source: str) -> None:
        exact_div(self.hidden_size, self.heads, f"{source}: hidden_size / num_attention_heads")
        exact_div(self.head_dim, 2, f"{source}: head dimension / 2 (rotary pairs)")
        exact_div(self.heads, self.kv_heads, f"{source}: num_attention_heads / num_key_value_heads")
        if not self.fork_layer < self.layers:
            raise ConfigError(f"{source}: fork layer {self.fork_layer} lies outside the {self.layers} layers")
        if not self.token_offset < self.vocab_size:
            raise ConfigError(f"{source}: kimia_token_offset {self.token_offset} leaves no audio codes")


@dataclass(frozen=True)
class FeatureConfig:
    """`preprocessor_config.json` of either encoder."""

    mel_bins: int  # feature_size
    hop: int  # samples between mel frames
    n_fft: int
    sample_rate: int  # Hz
    segment_samples: int  # longest piece encoded at once (30 s)

    @classmethod
    def read(cls, path: Path) -> FeatureConfig:
        """Read and check `preprocessor_config.json`."""
        fields = read_fields(path)
        fields.choice("padding_value", (0.0,), default=0.0)
        fields.choice("dither", (0.0,), default=0.0)
        rate = fields.integer("sampling_rate")
        segment = fields.integer("chunk_length") * rate
        hop = fields.integer("hop_length")
        exact_div(segment, hop, f"{path}: samples of a segment / hop_length")
        n_fft = fields.integer("n_fft")
        exact_div(n_fft, 2, f"{path}: n_fft / 2 (centred frames)")
        if n_fft > segment:
            raise ConfigError(f"{path}: n_fft {n_fft} exceeds the {segment} samples of a segment")
        return cls(fields.integer("feature_size"), hop, n_fft, rate, segment)


@dataclass(frozen=True)
class EncoderConfig:
    """The Whisper encoder fields of a `config.json`."""

    d_model: int
    layers: int
    heads: int
    ffn_dim: int
    mel_bins: int
    max_positions: int  # 50 Hz frames of one segment (max_source_positions)
    activation: str
    scale_embedding: bool

    @classmethod
    def read(cls, path: Path) -> EncoderConfig:
        """Read and check the encoder part of a Whisper `config.json`."""
        fields = read_fields(path)
        config = cls(
            d_model=fields.integer("d_model"),
            layers=fields.integer("encoder_layers", maximum=DEPTH_LIMIT),
            heads=fields.integer("encoder_attention_heads"),
            ffn_dim=fields.integer("encoder_ffn_dim"),
            mel_bins=fields.integer("num_mel_bins"),
            max_positions=fields.integer("max_source_positions"),
            activation=fields.choice("activation_function", ("gelu", "relu", "silu", "gelu_new")),
            scale_embedding=fields.flag("scale_embedding", default=False),
        )
        exact_div(config.d_model, config.heads, f"{path}: d_model / encoder_attention_heads")
        return config


def check_features(
    encoder: EncoderConfig,
    features: FeatureConfig,
    config: str = "config.json",
    preprocessor: str = "preprocessor_config.json",
) -> None:
    """Refuse a preprocessor that does not fit its encoder with a ConfigError that names both files."""
    if features.mel_bins != encoder.mel_bins:
        raise ConfigError(
            f"the parts do not fit together: {config}: num_mel_bins is {encoder.mel_bins}, "
            f"{preprocessor}: feature_size is {features.mel_bins}"
        )
    frames = -(-features.segment_samples // (ENCODER_STRIDE * features.hop))
    if frames > encoder.max_positions:
        raise ConfigError(
            f"{preprocessor}: a segment of chunk_length has {frames} encoder frames, "
            f"{config}: max_source_positions is {encoder.max_positions}"
        )


@dataclass(frozen=True)
class VQConfig:
    """`config.json` of the GLM-4-Voice tokenizer: a Whisper encoder cut after `quantize_position` layers."""

    encoder: EncoderConfig
    pooling_kernel: int  # 50 Hz frames per token; 1 = no pooling
    pooling_type: str  # "avg" | "max"
    pooling_position: int  # pooled after this many layers
    quantize_position: int  # quantised after this many layers
    codebook_size: int
    block_size: int | None  # 50 Hz frames that see each other; None = bidirectional
    causal_convolution: bool
    causal_attention: bool

    @classmethod
    def read(cls, path: Path) -> VQConfig:
        """Read and check the tokenizer's `config.json`."""
        fields = read_fields(path)
        encoder = EncoderConfig.read(path)
        kernel = fields.values.get("pooling_kernel_size", MISSING)
        pooled = kernel is not None
        causal = [fields.flag(name, default=False) for name in ("encoder_causal_attention", "quantize_causal_encoder")]
        block = fields.values.get("quantize_causal_block_size")
        quantize_position = fields.integer("quantize_position")
        config = cls(
            encoder=encoder,
            pooling_kernel=fields.integer("pooling_kernel_size") if pooled else 1,
            pooling_type=fields.choice("pooling_type", ("avg", "max"), default="max") if pooled else "avg",
            pooling_position=fields.integer("pooling_position") if pooled else quantize_position,
            quantize_position=quantize_position,
            codebook_size=fields.integer("quantize_vocab_size"),
            block_size=None if block is None else fields.integer("quantize_causal_block_size"),
            causal_convolution=fields.flag("encoder_causal_convolution"),
            causal_attention=any(causal),
        )
        config._check(str(path))
        return config

    def _check(self, source: str) -> None:
        if self.quantize_position > self.encoder.layers:
            raise ConfigError(f"{source}: quantize_position {self.quantize_position} exceeds encoder_layers")
        if self.pooling_position > self.quantize_position:
            raise ConfigError(f"{source}: pooling_position lies after quantize_position")
        pooled_layers = self.quantize_position - self.pooling_position
        block = None if self.causal_attention else self.block_size
        if block is not None and block < self.pooling_kernel and pooled_layers:
            raise ConfigError(
                f"{source}: quantize_causal_block_size is smaller than pooling_kernel_size, so that the "
                f"{pooled_layers} layers behind the pooling would see nothing"
            )


@dataclass(frozen=True)
class FlowConfig:
    """`audio_detokenizer/config.yaml`: the flow-matching DiT and its mel normalisation."""

    mel_bins: int  # input_size
    audio_codes: int  # semantic_vocab_size; the embedding has one row more (classifier-free guidance, unused)
    hidden_size: int
    depth: int
    heads: int
    mlp_hidden: int
    position_embedding: str  # "skip" | "learnable" | "sincos"
    use_rope: bool
    rope_base: float
    rope_scale: float  # positions are multiplied by it (1 / rope_interpolation_factor)
    max_positions: int  # mel frames that the position tables cover; UNLIMITED without any
    max_seq_len: int  # rows of a learnable position table, less one
    mel_mean: float  # 0 when normalize_mel is false
    mel_std: float  # 1 when normalize_mel is false

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @classmethod
    def read(cls, path: Path) -> FlowConfig:
        """Read and check `config.yaml`."""
        top = read_fields(path)
        fields = top.section("model").section("dit")
        fields.choice("ffn_type", ("vanilla_mlp",))
        use_rope = fields.flag("use_rope", default=False)
        # Null and absent rope_params mean the defaults; without RoPE nothing in them counts.
        given = use_rope and fields.values.get("rope_params") is not None
        rope = fields.section("rope_params") if given else Fields(f"{fields.source}: rope_params", {})
        normalize = top.flag("normalize_mel")
        max_seq_len = fields.integer("max_seq_len")
        position_embedding = fields.choice("position_embedding_type", ("skip", "learnable", "sincos"))
        rows = max_seq_len + 1 if position_embedding == "learnable" else UNLIMITED
        covered = min(rope.integer("max_position_embeddings", default=4096), max_seq_len) if use_rope else rows
        config = cls(
            mel_bins=fields.integer("input_size"),
            audio_codes=fields.integer("semantic_vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            depth=fields.integer("depth", maximum=DEPTH_LIMIT),
            heads=fields.integer("num_heads"),
            mlp_hidden=_mlp_hidden(fields),
            position_embedding=position_embedding,
            use_rope=use_rope,
            rope_base=rope.number("rope_base", default=10000.0, positive=True),
            rope_scale=1.0 / rope.number("rope_interpolation_factor", default=1.0, positive=True),
            max_positions=covered,
            max_seq_len=max_seq_len,
            mel_mean=top.number("mel_mean") if normalize else 0.0,
            mel_std=top.number("mel_std", positive=True) if normalize else 1.0,
        )
        exact_div(config.hidden_size, config.heads, f"{path}: hidden_size / num_heads")
        if use_rope:
            exact_div(config.head_dim, 2, f"{path}: head dimension / 2 (rotary pairs)")
        if position_embedding == "sincos" and config.hidden_size < 4:
            raise ConfigError(f"{path}: hidden_size {config.hidden_size} is too small for a sincos position embedding")
        return config


def _mlp_hidden(fields: Fields) -> int:
    width = fields.integer("hidden_size") * fields.number("mlp_ratio", positive=True)
    if not 1 <= width <= DIMENSION_LIMIT:
        raise ConfigError(f"{fields.source}: hidden_size x mlp_ratio must lie in 1..{DIMENSION_LIMIT}, got {width:g}")
    return int(width)


@dataclass(frozen=True)
class VocoderConfig:
    """`vocoder/config.json`: BigVGAN and the mel spectrogram it inverts."""

    mel_bins: int
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    initial_channels: int
    resblock_kernels: tuple[int, ...]
    resblock_dilations: tuple[tuple[int, ...], ...]
    activation: str  # "snakebeta" | "snake"
    snake_logscale: bool
    bias_at_final: bool
    tanh_at_final: bool
    n_fft: int
    hop: int  # samples of one mel frame
    win: int
    sample_rate: int  # Hz
    fmin: float
    fmax: float | None

    @classmethod
    def read(cls, path: Path) -> VocoderConfig:
        """Read and check `config.json` of the vocoder."""
        fields = read_fields(path)
        fields.choice("resblock", ("1",))  # "2" returns nothing upstream
        n_fft = fields.integer("n_fft")
        config = cls(
            mel_bins=fields.integer("num_mels"),
            upsample_rates=fields.integers("upsample_rates"),
            upsample_kernels=fields.integers("upsample_kernel_sizes"),
            initial_channels=fields.integer("upsample_initial_channel"),
            resblock_kernels=fields.integers("resblock_kernel_sizes"),
            resblock_dilations=fields.integer_lists("resblock_dilation_sizes"),
            activation=fields.choice("activation", ("snakebeta", "snake")),
            snake_logscale=fields.flag("snake_logscale"),
            bias_at_final=fields.flag("use_bias_at_final", default=True),
            tanh_at_final=fields.flag("use_tanh_at_final", default=True),
            n_fft=n_fft,
            hop=fields.integer("hop_size"),
            win=fields.integer("win_size", default=n_fft, maximum=n_fft),
            sample_rate=fields.integer("sampling_rate"),
            fmin=fields.number("fmin", default=0.0),
            fmax=None if fields.values.get("fmax") is None else fields.number("fmax", positive=True),
        )
        config._check(str(path))
        return config

    def _check(self, source: str) -> None:
        upsampling = 1
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=False):
            upsampling *= rate
            exact_div(kernel - rate, 2, f"{source}: (upsample kernel - rate) / 2")
            if kernel < rate:
                raise ConfigError(f"{source}: the upsample kernel {kernel} is shorter than its rate {rate}")
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise ConfigError(f"{source}: upsample_rates and upsample_kernel_sizes differ in length")
        if len(self.resblock_kernels) != len(self.resblock_dilations):
            raise ConfigError(f"{source}: resblock_kernel_sizes and resblock_dilation_sizes differ in length")
        for kernel in self.resblock_kernels:
            exact_div(kernel - 1, 2, f"{source}: (resblock kernel - 1) / 2")
        if upsampling != self.hop:
            raise ConfigError(f"{source}: the upsample_rates multiply to {upsampling}, hop_size is {self.hop}")
        exact_div(self.initial_channels, 2 ** len(self.upsample_rates), f"{source}: channels halved per stage")
