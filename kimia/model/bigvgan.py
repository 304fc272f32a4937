"""BigVGAN in plain PyTorch, and the log-mel spectrogram that it inverts.

A mel frame is upsampled stage by stage to `hop` samples; after each stage the mean of several dilated residual blocks
runs. Their periodic activation (Snake) works at twice the rate between two fixed low-pass filters, against aliasing.

Shapes: B batch, M mel bins, F mel frames, C channels, T samples at a stage's rate.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.errors import AudioError
from kimia.model.checkpoint import (
    ARCHIVE,
    SINGLE_FILE,
    Source,
    fold_weight_norm,
    load_strict,
    safetensors_source,
    torch_source,
)
from kimia.model.config import VocoderConfig
from kimia.model.layout import SNAKE_TAPS, stage_channels

EDGE_KERNEL = 7  # of the first and the last convolution, a constant of BigVGAN's code
OVERSAMPLING = 2  # rate at which Snake is applied
DIVISION_GUARD = 1e-9  # added to Snake's divisor
POWER_FLOOR = 1e-9  # under the magnitude's root
MEL_FLOOR = 1e-5  # of the magnitude, before the logarithm


class Vocoder(Protocol):
    """What makes sound of mels, here or elsewhere."""

    @property
    def config(self) -> VocoderConfig:
        """Its dimensions."""

    def __call__(self, mel: Tensor, /) -> Tensor:
        """De-normalised log-mel (B, M, F) -> waveform in -1..1 (B, hop * F), float32 on the same device."""


# ---- the activation ---------------------------------------------------------------------------------------------


class Snake(nn.Module):
    """x + sin(a x)^2 / b per channel; `snake` has b = a, `snakebeta` its own; both may be stored as logarithms."""

    def __init__(self, config: VocoderConfig, channels: int) -> None:
        super().__init__()
        self.logscale = config.snake_logscale
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels)) if config.activation == "snakebeta" else None

    def _scale(self, parameter: Tensor) -> Tensor:
        return (parameter.exp() if self.logscale else parameter)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        alpha = self._scale(self.alpha)
        beta = alpha if self.beta is None else self._scale(self.beta)
        return x + torch.sin(x * alpha).square() / (beta + DIVISION_GUARD)


class Upsample(nn.Module):
    """Twice the rate through the stored low-pass filter."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.empty(1, 1, SNAKE_TAPS))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, 2 T)."""
        channels = x.shape[1]
        edge = SNAKE_TAPS // OVERSAMPLING - 1
        padded = F.pad(x, (edge, edge), mode="replicate")
        taps = OVERSAMPLING * self.filter.expand(channels, 1, SNAKE_TAPS)
        raised = F.conv_transpose1d(padded, taps, stride=OVERSAMPLING, groups=channels)
        crop = edge * OVERSAMPLING + (SNAKE_TAPS - OVERSAMPLING) // 2
        return raised[..., crop:-crop]


class LowPass(nn.Module):
    """Holder of the stored filter, under the name that the file gives it."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.empty(1, 1, SNAKE_TAPS))


class Downsample(nn.Module):
    """Half the rate through the stored low-pass filter."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2 T) -> (B, C, T)."""
        channels = x.shape[1]
        half = SNAKE_TAPS // 2
        padded = F.pad(x, (half - 1, half), mode="replicate")
        taps = self.lowpass.filter.expand(channels, 1, SNAKE_TAPS)
        return F.conv1d(padded, taps, stride=OVERSAMPLING, groups=channels)


class Activation(nn.Module):
    """Snake at twice the rate."""

    def __init__(self, config: VocoderConfig, channels: int) -> None:
        super().__init__()
        self.act = Snake(config, channels)
        self.upsample = Upsample()
        self.downsample = Downsample()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        return self.downsample(self.act(self.upsample(x)))


# ---- the network ------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """For each dilation: activation, dilated convolution, activation, plain convolution, added to the input."""

    def __init__(self, config: VocoderConfig, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)
            for dilation in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)
        self.activations = nn.ModuleList(Activation(config, channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        pairs = zip(self.convs1, self.convs2, self.activations[::2], self.activations[1::2], strict=True)
        for dilated, plain, first, second in pairs:
            x = x + plain(second(dilated(first(x))))
        return x


class BigVGAN(nn.Module):
    """Mel to waveform."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = stage_channels(config)
        kinds = list(zip(config.resblock_kernels, config.resblock_dilations, strict=True))
        self.conv_pre = nn.Conv1d(config.mel_bins, channels[0], EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose1d(wide, narrow, kernel, rate, padding=(kernel - rate) // 2))
            for wide, narrow, kernel, rate in zip(
                channels, channels[1:], config.upsample_kernels, config.upsample_rates, strict=False
            )
        )
        self.resblocks = nn.ModuleList(ResidualBlock(config, width, *kind) for width in channels[1:] for kind in kinds)
        self.activation_post = Activation(config, channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, EDGE_KERNEL, padding=EDGE_KERNEL // 2, bias=config.bias_at_final)

    def forward(self, mel: Tensor) -> Tensor:
        """De-normalised log-mel (B, M, F) -> waveform in -1..1 (B, hop * F), float32."""
        kinds = len(self.config.resblock_kernels)
        x = self.conv_pre(mel.to(self.conv_pre.weight.dtype))
        for stage, upsample in enumerate(self.ups):
            x = upsample(x)
            blocks = self.resblocks[stage * kinds : (stage + 1) * kinds]
            x = torch.stack([block(x) for block in blocks]).mean(dim=0)
        wave = self.conv_post(self.activation_post(x)).squeeze(1).float()
        return wave.tanh() if self.config.tanh_at_final else wave.clamp(-1.0, 1.0)


def load_vocoder(folder: Path, device: torch.device | str, dtype: torch.dtype) -> BigVGAN:
    """Load `vocoder/`: `model.safetensors` (as converted, weight norm folded), else the released `model.pt`.

    Raises CheckpointError, ConfigError or WeightsError.
    """
    config = VocoderConfig.read(folder / "config.json")
    with torch.device("meta"):
        vocoder = BigVGAN(config)
    load_strict(vocoder, _vocoder_source(folder), str(folder), device=device, dtype=dtype)
    return vocoder


def _vocoder_source(folder: Path) -> Source:
    converted = folder / SINGLE_FILE
    return safetensors_source(converted) if converted.exists() else released_vocoder(folder)


def released_vocoder(folder: Path) -> Source:
    """The vocoder's tensors in the released `model.pt`, weight norm folded."""
    return fold_weight_norm(torch_source(folder / ARCHIVE, "generator"))


# ---- the spectrogram --------------------------------------------------------------------------------------------


def mel_spectrogram(wave: Tensor, config: VocoderConfig) -> Tensor:
    """Log-mel of a waveform (S,) at the vocoder's rate -> (F, M), natural logarithm, F = S // hop.

    Raises AudioError for less than one frame.
    """
    edge = (config.n_fft - config.hop) // 2
    if wave.dim() != 1 or wave.shape[0] < max(config.hop, edge + 1):
        shape = tuple(wave.shape)
        raise AudioError(f"a mel spectrogram needs one channel of at least {config.hop} samples, got shape {shape}")
    padded = F.pad(wave.float()[None], (edge, edge), mode="reflect")
    window = torch.hann_window(config.win, device=wave.device)
    spectrum = torch.stft(
        padded, config.n_fft, config.hop, config.win, window, center=False, return_complex=True
    )  # (1, bins, F)
    magnitude = torch.sqrt(torch.view_as_real(spectrum[0]).square().sum(-1) + POWER_FLOOR)
    return (_mel_bank(config).to(wave.device) @ magnitude).clamp(min=MEL_FLOOR).log().T


@lru_cache(maxsize=4)
def _mel_bank(config: VocoderConfig) -> Tensor:
    """Slaney-scale, Slaney-normalised filters, (M, bins)."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=config.n_fft // 2 + 1,
        num_mel_filters=config.mel_bins,
        min_frequency=config.fmin,
        max_frequency=config.sample_rate / 2 if config.fmax is None else config.fmax,
        sampling_rate=config.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank).float().T
