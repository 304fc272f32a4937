"""An independent, slow formulation of the audio encoders, and tiny random checkpoints to compare it with.

Nothing here is shared with kimia but the config dataclasses: explicit loops for masks and pooling, attention written
out head by head, GELU by erf.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kimia.model.config import EncoderConfig, FeatureConfig, VQConfig

FEATURES = FeatureConfig(mel_bins=12, hop=160, n_fft=400, sample_rate=16000, segment_samples=32000)  # 2 s
ENCODER = EncoderConfig(
    d_model=16,
    layers=4,
    heads=2,
    ffn_dim=24,
    mel_bins=12,
    max_positions=100,
    activation="gelu",
    scale_embedding=False,
)


# ---- random weights ----------------------------------------------------------------------------------------------


def layer_weights(prefix: str, config: EncoderConfig, rng: torch.Generator) -> dict[str, Tensor]:
    d, f = config.d_model, config.ffn_dim
    shapes = {f"self_attn.{name}_proj.weight": (d, d) for name in "qkv"}
    shapes |= {"self_attn.out_proj.weight": (d, d), "fc1.weight": (f, d), "fc2.weight": (d, f)}
    shapes |= {f"self_attn.{name}_proj.bias": (d,) for name in ("q", "v", "out")}
    shapes |= {"fc1.bias": (f,), "fc2.bias": (d,)}
    shapes |= {f"{norm}.{part}": (d,) for norm in ("self_attn_layer_norm", "final_layer_norm") for part in NORM}
    return {f"{prefix}{name}": random_weight(name, shape, rng) for name, shape in shapes.items()}


NORM = ("weight", "bias")


def random_weight(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return 1 + 0.3 * torch.randn(shape, generator=rng)
    gain = 1.7 if len(shape) > 1 else 0.3  # attention sharp enough to notice a wrong mask
    return gain * torch.randn(shape, generator=rng) / math.sqrt(math.prod(shape[1:]))


def encoder_weights(config: EncoderConfig, layers: int, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    d = config.d_model
    weights = {
        "conv1.weight": random_weight("conv1", (d, config.mel_bins, 3), rng),
        "conv1.bias": random_weight("conv1", (d,), rng),
        "conv2.weight": random_weight("conv2", (d, d, 3), rng),
        "conv2.bias": random_weight("conv2", (d,), rng),
        "embed_positions.weight": 0.5 * torch.randn(config.max_positions, d, generator=rng),
    }
    for index in range(layers):
        weights |= layer_weights(f"layers.{index}.", config, rng)
    return weights


def vq_weights(config: VQConfig, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1000 + seed)
    codebook = 3 * torch.randn(config.codebook_size, config.encoder.d_model, generator=rng)
    return encoder_weights(config.encoder, config.quantize_position, seed) | {"codebook.weight": codebook}


def whisper_weights(config: EncoderConfig, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2000 + seed)
    norm = {f"layer_norm.{part}": random_weight(f"layer_norm.{part}", (config.d_model,), rng) for part in NORM}
    return encoder_weights(config, config.layers, seed) | norm


# ---- folders in the released layout ------------------------------------------------------------------------------


def write_folder(folder: Path, config: dict, features: FeatureConfig, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "feature_size": features.mel_bins,
        "hop_length": features.hop,
        "n_fft": features.n_fft,
        "sampling_rate": features.sample_rate,
        "chunk_length": features.segment_samples // features.sample_rate,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def encoder_json(config: EncoderConfig) -> dict:
    names = {
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "ffn_dim": "encoder_ffn_dim",
        "mel_bins": "num_mel_bins",
        "max_positions": "max_source_positions",
        "activation": "activation_function",
    }
    return {names.get(name, name): value for name, value in asdict(config).items()}


def vq_json(config: VQConfig) -> dict:
    return encoder_json(config.encoder) | {
        "pooling_kernel_size": config.pooling_kernel,
        "pooling_type": config.pooling_type,
        "pooling_position": config.pooling_position,
        "quantize_position": config.quantize_position,
        "quantize_vocab_size": config.codebook_size,
        "quantize_causal_block_size": config.block_size,
        "quantize_causal_encoder": False,
        "encoder_causal_attention": config.causal_attention,
        "encoder_causal_convolution": config.causal_convolution,
    }


# ---- the networks, plainly ---------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS = {"gelu": gelu, "relu": F.relu}


def convolutions(weights: dict[str, Tensor], mel: Tensor, *, causal: bool) -> Tensor:
    """(M, T) to (T/2, d)."""
    x = mel[None]
    for name, stride in (("conv1", 1), ("conv2", 2)):
        padded = F.pad(x, (2, 0) if causal else (1, 1))
        x = gelu(F.conv1d(padded, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride))
    return x[0].T


def attention(weights: dict[str, Tensor], prefix: str, x: Tensor, heads: int, mask: list[list[bool]]) -> Tensor:
    def project(name: str) -> Tensor:
        return F.linear(x, weights[f"{prefix}{name}_proj.weight"], weights.get(f"{prefix}{name}_proj.bias"))

    query, key, value = project("q"), project("k"), project("v")
    width = x.shape[1] // heads
    allowed = torch.tensor(mask)
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / math.sqrt(width)
        outputs.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[:, part])
    return F.linear(torch.cat(outputs, 1), weights[f"{prefix}out_proj.weight"], weights[f"{prefix}out_proj.bias"])


def norm(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def layer(weights: dict[str, Tensor], index: int, x: Tensor, config: EncoderConfig, mask: list[list[bool]]) -> Tensor:
    prefix = f"layers.{index}."
    normed = norm(weights, f"{prefix}self_attn_layer_norm", x)
    x = x + attention(weights, f"{prefix}self_attn.", normed, config.heads, mask)
    inner = F.linear(
        norm(weights, f"{prefix}final_layer_norm", x), weights[f"{prefix}fc1.weight"], weights[f"{prefix}fc1.bias"]
    )
    inner = ACTIVATIONS[config.activation](inner)
    return x + F.linear(inner, weights[f"{prefix}fc2.weight"], weights[f"{prefix}fc2.bias"])


def vq_mask(valid: list[bool], block: int | None, *, causal: bool) -> list[list[bool]]:
    def sees(i: int, j: int) -> bool:
        if causal:
            return j <= i
        if block is None:
            return valid[j]
        return valid[j] and (j <= i or i // block == j // block)

    return [[sees(i, j) for j in range(len(valid))] for i in range(len(valid))]


def pooled(x: Tensor, kernel: int, kind: str) -> Tensor:
    rows = []
    for start in range(0, len(x), kernel):
        group = x[start : start + kernel]
        group = torch.cat([group, torch.zeros(kernel - len(group), x.shape[1])])
        rows.append(group.max(0).values if kind == "max" else group.sum(0) / kernel)
    return torch.stack(rows)


def vq_states(weights: dict[str, Tensor], config: VQConfig, mel: Tensor, samples: int, hop: int) -> dict[str, Tensor]:
    """Every state of one segment (M, T), by the names that kimia gives them."""
    x = convolutions(weights, mel, causal=config.causal_convolution)
    x = x + weights["embed_positions.weight"][: len(x)]
    valid = [2 * hop * frame < samples for frame in range(len(x))]
    block = config.block_size
    states = {"in0": x}
    for index in range(config.quantize_position):
        mask = vq_mask(valid, block, causal=config.causal_attention)
        x = states[f"out{index}"] = layer(weights, index, x, config.encoder, mask)
        if index + 1 == config.pooling_position:
            x = pooled(x, config.pooling_kernel, config.pooling_type)
            valid = valid[:: config.pooling_kernel]
            block = None if block is None else block // config.pooling_kernel
    return states | {"hidden": x}


def nearest(weights: dict[str, Tensor], hidden: Tensor) -> list[int]:
    distances = (hidden.double()[:, None] - weights["codebook.weight"].double()[None]).square().sum(-1)
    return [min(range(len(row)), key=lambda code: (row[code], code)) for row in distances.tolist()]


def whisper_features(weights: dict[str, Tensor], config: EncoderConfig, mel: Tensor, group: int, count: int) -> Tensor:
    """Features (count, group * d) of one segment, padded to its full length (M, T)."""
    x = convolutions(weights, mel, causal=False) + weights["embed_positions.weight"]
    for index in range(config.layers):
        x = layer(weights, index, x, config, [[True] * len(x)] * len(x))
    x = norm(weights, "layer_norm", x)
    return torch.stack([torch.cat(list(x[n * group : (n + 1) * group])) for n in range(count)])


# ---- audio -------------------------------------------------------------------------------------------------------


def log_mel(segment: np.ndarray, padded: int, bank: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """One frame at a time, from the definition (a discrete Fourier transform by matrix)."""
    signal = np.concatenate([segment.astype(np.float64), np.zeros(padded - len(segment))])
    half = n_fft // 2
    signal = np.concatenate([signal[half:0:-1], signal, signal[-2 : -half - 2 : -1]])
    times = np.arange(n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * times / n_fft)
    basis = np.exp(-2j * np.pi * np.outer(np.arange(half + 1), times) / n_fft)
    columns = [
        bank.T @ np.abs(basis @ (signal[start : start + n_fft] * window)) ** 2 for start in range(0, padded, hop)
    ]
    mel = np.log10(np.maximum(np.stack(columns, 1), 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a swelling loudness, so that its mel spectrogram has structure."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    loudness = 0.02 + 0.2 * np.sin(2 * np.pi * (1.3 + 0.2 * seed) * time) ** 2
    tone = np.sin(2 * np.pi * (200 + 150 * np.sin(2 * np.pi * 2 * time)) * time)
    return (loudness * (tone + 0.3 * rng.standard_normal(samples))).astype(np.float32)
