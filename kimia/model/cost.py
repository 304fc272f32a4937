"""What the networks cost, by arithmetic on the configs: operations, bytes moved, and the time that no device can beat.

Counted: the multiplications of linear layers, convolutions and attention as two operations each; bytes are the weights
and the KV cache that one run must read from memory. Left out, being a few per cent: norms, activations, softmax,
rotations, sampling, and the filters around BigVGAN's snakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

from kimia.model import layout
from kimia.model.config import ENCODER_STRIDE, EncoderConfig, FlowConfig, LMConfig, VocoderConfig, VQConfig
from kimia.model.consistency import ModelConfigs
from kimia.model.detokenize import UPSAMPLE
from kimia.model.presets import Preset

QUANTIZED = ("_proj.weight", "lm_head.weight", "mimo_output.weight")  # ends of the names of what is quantised
CODE_SECONDS = 0.08  # of audio that a semantic token becomes


@dataclass(frozen=True)
class Cost:
    """Work of one run: floating-point operations, and bytes read from memory."""

    flop: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flop * times, self.bytes * times)


@dataclass(frozen=True)
class Device:
    """Peak rates of a device."""

    flop_per_second: float
    bytes_per_second: float

    def floor_seconds(self, cost: Cost) -> float:
        """The time below which no program on this device can do the work."""
        return max(cost.flop / self.flop_per_second, cost.bytes / self.bytes_per_second)


def parameter_counts(configs: ModelConfigs) -> dict[str, int]:
    """Parameters of each part; training state of the codebook left out."""
    counts = {
        "language model": layout.parameters(layout.language_model(configs.lm)),
        "whisper encoder": layout.parameters(layout.whisper_encoder(configs.whisper)),
        "vq tokenizer": layout.parameters(layout.vq_tokenizer(configs.vq)),
    }
    if configs.flow is not None and configs.vocoder is not None:
        counts["flow matching"] = layout.parameters(layout.flow(configs.flow))
        counts["vocoder"] = layout.parameters(layout.vocoder(configs.vocoder))
    return counts


# ---- encoders ---------------------------------------------------------------------------------------------------


def _encoder(config: EncoderConfig, frames: int, layers: int, bytes_per_value: int) -> Cost:
    """`layers` Whisper layers and both convolutions over `frames` encoder frames, attention dense."""
    width = config.d_model
    weights = 4 * width**2 + 2 * width * config.ffn_dim  # of one layer
    convolutions = 3 * width * (ENCODER_STRIDE * config.mel_bins + width)  # per encoder frame
    attention = 2 * width * frames  # scores and weighted sum, per frame and layer
    multiplications = frames * (layers * (weights + attention) + convolutions)
    stored = layers * weights + 3 * width * (config.mel_bins + width)
    return Cost(2 * multiplications, stored * bytes_per_value)


def whisper_segment(config: EncoderConfig, bytes_per_value: int) -> Cost:
    """Continuous features of one segment: always computed over the full 30 s."""
    return _encoder(config, config.max_positions, config.layers, bytes_per_value)


def vq_segment(config: VQConfig, frames: int, bytes_per_value: int) -> Cost:
    """Semantic tokens of one segment of `frames` 50 Hz frames, with the search in the codebook."""
    tokens = -(-frames // config.pooling_kernel)
    before = _encoder(config.encoder, frames, config.pooling_position, bytes_per_value)
    width, after_pooling = config.encoder.d_model, config.quantize_position - config.pooling_position
    layer = 4 * width**2 + 2 * width * config.encoder.ffn_dim
    codebook = config.codebook_size * width
    return before + Cost(
        2 * tokens * (after_pooling * (layer + 2 * width * tokens) + codebook),
        (after_pooling * layer + codebook) * bytes_per_value,
    )


# ---- language model ---------------------------------------------------------------------------------------------


class Step(Enum):
    """Which part of the language model a decode step has to compute."""

    FULL = "both tracks"
    DELAY = "without the audio head: audio is blank during the delay"
    TEXT = "without the audio branch: text answers have no audio"
    SPEECH = "without the trunk above the fork: text is blank after its end"


def _active(config: LMConfig, step: Step) -> tuple[int, int]:
    """(layers, heads) that a step runs through."""
    above_fork = config.layers - config.fork_layer - 1
    everything = config.layers + config.mimo_layers
    return {
        Step.FULL: (everything, 2),
        Step.DELAY: (everything, 1),
        Step.TEXT: (config.layers, 1),
        Step.SPEECH: (everything - above_fork, 1),
    }[step]


def _layer_parameters(config: LMConfig) -> int:
    return layout.parameters(layout.decoder_layer(config, ""))


def _kv_values(config: LMConfig, layers: int) -> int:
    """Values that one position keeps in the cache."""
    return 2 * layers * config.kv_heads * config.head_dim


def language_model_bytes(config: LMConfig, bytes_per_value: int, quantized: bool) -> int:
    """Memory of the weights; quantised, the matrices of layers and heads take a byte each, scales left out."""
    tensors = layout.language_model(config)
    matrices = sum(prod(shape) for name, shape in tensors.items() if quantized and name.endswith(QUANTIZED))
    return matrices + (layout.parameters(tensors) - matrices) * bytes_per_value


def kv_bytes_per_position(config: LMConfig, bytes_per_value: int) -> int:
    """Bytes that one position of one conversation holds in the KV cache."""
    return _kv_values(config, config.layers + config.mimo_layers) * bytes_per_value


def decode_step(config: LMConfig, context: int, bytes_per_value: int, step: Step = Step.FULL) -> Cost:
    """One step of one conversation after `context` positions."""
    layers, heads = _active(config, step)
    weights = layers * _layer_parameters(config) + heads * config.vocab_size * config.hidden_size
    attention = 2 * config.hidden_size * (context + 1) * layers
    cache = _kv_values(config, layers) * context
    return Cost(2 * (weights + attention), (weights + cache) * bytes_per_value)


def prefill(config: LMConfig, positions: int, audio_positions: int, bytes_per_value: int) -> Cost:
    """A prompt of `positions`, of which `audio_positions` carry features; logits of the last position only."""
    layers, heads = _active(config, Step.FULL)
    adaptor = layout.parameters(layout.adaptor(config))
    head_weights = heads * config.vocab_size * config.hidden_size
    layer_weights = layers * _layer_parameters(config)
    attention = 2 * config.hidden_size * layers * positions * (positions + 1) / 2  # causal
    multiplications = positions * layer_weights + attention + audio_positions * adaptor + head_weights
    read = layer_weights + head_weights + (adaptor if audio_positions else 0)
    return Cost(2 * multiplications, read * bytes_per_value)


# ---- detokenizer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowChunk:
    """One push through the flow-matching model, in mel frames."""

    frames: int  # solved for, the look-ahead included
    committed: int  # of them kept: they pass once more to enter the cache
    evaluations: int  # of the velocity field
    prefix: int  # frames in the cache
    frames_per_modulation: int = UPSAMPLE  # 1: computed for every repeated frame, as upstream does


def flow_chunk(config: FlowConfig, chunk: FlowChunk, bytes_per_value: int) -> Cost:
    """Solving one chunk and committing it."""
    width = config.hidden_size
    transforms = 4 * width**2 + 2 * width * config.mlp_hidden  # attention and MLP of one block
    modulation = 6 * width**2
    per_frame = transforms + modulation / chunk.frames_per_modulation + 2 * width * (chunk.prefix + chunk.frames)
    ends = 2 * width * config.mel_bins + 2 * width**2 / chunk.frames_per_modulation
    passes = chunk.evaluations * chunk.frames + chunk.committed
    runs = chunk.evaluations + (1 if chunk.committed else 0)
    weights = layout.parameters(layout.flow(config)) - (config.audio_codes + 1) * width  # table rows are looked up
    cache = 2 * width * config.depth * chunk.prefix
    return Cost(2 * passes * (config.depth * per_frame + ends), runs * (weights + cache) * bytes_per_value)


def flow_second(
    config: FlowConfig, preset: Preset, bytes_per_value: int, frames_per_modulation: int = UPSAMPLE
) -> Cost:
    """A second of audio in the steady state: the last size of chunk, behind a full window."""
    committed = preset.commits[-1]
    solved = committed + preset.look_ahead
    chunk = FlowChunk(
        solved * UPSAMPLE, committed * UPSAMPLE, len(preset.grid.sizes), preset.kv_window, frames_per_modulation
    )
    return flow_chunk(config, chunk, bytes_per_value) * (1 / (committed * CODE_SECONDS))


def vocoder_chunk(config: VocoderConfig, frames: int, bytes_per_value: int) -> Cost:
    """Sound of `frames` mel frames."""
    rates = [1]  # samples per mel frame before the first and after each stage
    for rate in config.upsample_rates:
        rates.append(rates[-1] * rate)
    kernels = len(config.resblock_kernels)
    multiplications = 0
    weights = {name: shape for name, shape in layout.vocoder(config).items() if name.endswith(".weight")}
    for name, shape in weights.items():
        multiplications += prod(shape) * frames * _rate_of(name, rates, kernels)
    stored = layout.parameters(weights)
    return Cost(2 * multiplications, stored * bytes_per_value)


def _rate_of(name: str, rates: list[int], kernels: int) -> int:
    """How often per mel frame a convolution's weights are applied."""
    part, _, rest = name.partition(".")
    if part == "conv_pre":
        return rates[0]
    if part == "conv_post":
        return rates[-1]
    index = int(rest.partition(".")[0])
    return rates[index] if part == "ups" else rates[1 + index // kernels]  # transposed: applied to every input
