"""The vocoder against golden waveforms and convolutions written out; the mel spectrogram against a plain DFT."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from kimia.errors import AudioError, WeightsError
from kimia.model.bigvgan import BigVGAN, Snake, load_vocoder, mel_spectrogram
from kimia.model.config import VocoderConfig
from tests.golden_data import golden, golden_json
from tests.model.tiny_detokenizer import VOCODER, random_vocoder, randomised

pytestmark = pytest.mark.parity


def signal(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- golden waveforms -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_vocoder() -> BigVGAN:
    return load_vocoder(golden("detokenizer") / "checkpoint" / "vocoder", "cpu", torch.float32)


@pytest.fixture(scope="module")
def unit() -> dict[str, torch.Tensor]:
    return load_file(golden("detokenizer") / "unit.safetensors")


def test_golden_waveform(golden_vocoder, unit):
    wave = golden_vocoder(unit["vocoder.mel"].T[None])[0]
    torch.testing.assert_close(wave, unit["vocoder.wav"], atol=1e-5, rtol=0)


def test_golden_activation(golden_vocoder, unit):
    activation = golden_vocoder.resblocks[0].activations[0]
    torch.testing.assert_close(activation(unit["snake.x"][None])[0], unit["snake.y"], atol=5e-6, rtol=0)
    assert torch.equal(activation.upsample.filter.flatten(), unit["snake.filter_up"])
    assert torch.equal(activation.downsample.lowpass.filter.flatten(), unit["snake.filter_down"])


def test_golden_mels(golden_vocoder, unit):
    tolerance = golden_json("detokenizer", "goldens.json")["tolerances_float32"]["mel_extraction"]
    names = [name for name in unit if name.startswith("mel") and name.endswith(".wav")]
    for name in names:
        mel = mel_spectrogram(unit[name], golden_vocoder.config)
        torch.testing.assert_close(mel, unit[name.replace(".wav", ".mel")], atol=tolerance, rtol=0)
    assert names


# ---- the plain formulation --------------------------------------------------------------------------------------


def plain_upsampled(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Zeros between the samples (edges repeated far out), then the filter times 2, tap by tap."""
    length, half = x.shape[1], len(taps) // 2
    edge = 2 * half
    padded = np.pad(x, ((0, 0), (edge, edge)), mode="edge")
    spread = np.zeros((x.shape[0], 2 * padded.shape[1]))
    spread[:, ::2] = padded
    return np.stack(
        [
            sum(2 * taps[k] * spread[:, 2 * edge + t + half - 1 - k] for k in range(len(taps)))
            for t in range(2 * length)
        ],
        axis=1,
    )


def plain_downsampled(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    half = len(taps) // 2
    padded = np.pad(x, ((0, 0), (half - 1, half)), mode="edge")
    return np.stack([padded[:, t : t + len(taps)] @ taps for t in range(0, x.shape[1], 2)], axis=1)


def plain_activation(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    wide = plain_upsampled(x, weights[f"{name}.upsample.filter"].reshape(-1))
    alpha, beta = (np.exp(weights[f"{name}.act.{key}"])[:, None] for key in ("alpha", "beta"))
    wide = wide + np.sin(alpha * wide) ** 2 / (beta + 1e-9)
    return plain_downsampled(wide, weights[f"{name}.downsample.lowpass.filter"].reshape(-1))


def plain_convolution(weights: dict[str, np.ndarray], name: str, x: np.ndarray, dilation: int = 1) -> np.ndarray:
    """ "Same" padding with zeros, output by output."""
    kernel = weights[f"{name}.weight"]  # (out, in, taps)
    reach = dilation * (kernel.shape[2] - 1)
    padded = np.pad(x, ((0, 0), (reach // 2, reach // 2)))
    out = np.stack(
        [np.einsum("oik,ik->o", kernel, padded[:, t : t + reach + 1 : dilation]) for t in range(x.shape[1])], axis=1
    )
    return out + weights[f"{name}.bias"][:, None] if f"{name}.bias" in weights else out


def plain_raised(weights: dict[str, np.ndarray], name: str, x: np.ndarray, rate: int) -> np.ndarray:
    """Each sample spreads its kernel at `rate` times its index; the middle `rate * T` samples stay."""
    kernel = weights[f"{name}.weight"]  # (in, out, taps)
    taps = kernel.shape[2]
    out = np.zeros((kernel.shape[1], rate * x.shape[1] + taps - rate))
    for t in range(x.shape[1]):
        out[:, rate * t : rate * t + taps] += np.einsum("i,iok->ok", x[:, t], kernel)
    crop = (taps - rate) // 2
    return out[:, crop : crop + rate * x.shape[1]] + weights[f"{name}.bias"][:, None]


def plain_vocoder(vocoder: BigVGAN, mel: np.ndarray) -> np.ndarray:
    config = vocoder.config
    weights = {name: tensor.double().numpy() for name, tensor in vocoder.state_dict().items()}
    x = plain_convolution(weights, "conv_pre", mel)
    kinds = len(config.resblock_kernels)
    for stage, rate in enumerate(config.upsample_rates):
        x = plain_raised(weights, f"ups.{stage}.0", x, rate)
        branches = []
        for kind, dilations in enumerate(config.resblock_dilations):
            name, y = f"resblocks.{stage * kinds + kind}", x
            for j, dilation in enumerate(dilations):
                inner = plain_activation(weights, f"{name}.activations.{2 * j}", y)
                inner = plain_convolution(weights, f"{name}.convs1.{j}", inner, dilation)
                inner = plain_activation(weights, f"{name}.activations.{2 * j + 1}", inner)
                y = y + plain_convolution(weights, f"{name}.convs2.{j}", inner)
            branches.append(y)
        x = sum(branches) / kinds
    return plain_convolution(weights, "conv_post", plain_activation(weights, "activation_post", x))[0]


def test_vocoder_is_the_plain_one():
    vocoder, mel = random_vocoder(), signal(1, VOCODER.mel_bins, 9)
    expected = plain_vocoder(vocoder, mel[0].double().numpy())
    got = vocoder(mel)
    assert got.shape == (1, VOCODER.hop * 9)
    np.testing.assert_allclose(got[0].numpy(), expected.clip(-1, 1), atol=1e-5)
    assert 0.05 < np.abs(expected).max() < 1  # neither silent nor clipped


def test_the_last_step_is_tanh_or_clamp_with_or_without_bias():
    mel = signal(1, VOCODER.mel_bins, 9)
    for bias in (False, True):
        config = replace(VOCODER, bias_at_final=bias)
        vocoder = random_vocoder(config)
        vocoder.conv_post.weight.mul_(20)  # far beyond -1..1
        raw = plain_vocoder(vocoder, mel[0].double().numpy())
        assert np.abs(raw).max() > 1.5
        np.testing.assert_allclose(vocoder(mel)[0].numpy(), raw.clip(-1, 1), atol=1e-4)
        vocoder.config = replace(config, tanh_at_final=True)
        np.testing.assert_allclose(vocoder(mel)[0].numpy(), np.tanh(raw), atol=1e-4)


@pytest.mark.parametrize("logscale", [True, False])
@pytest.mark.parametrize("kind", ["snake", "snakebeta"])
def test_snake_is_its_formula(kind, logscale):
    snake = randomised(Snake(replace(VOCODER, activation=kind, snake_logscale=logscale), 2), 1, 1.0)
    x = signal(1, 2, 5)
    for channel in range(2):
        a = snake.alpha[channel].item()
        b = snake.beta[channel].item() if kind == "snakebeta" else a
        if logscale:
            a, b = math.exp(a), math.exp(b)
        for t in range(5):
            value = x[0, channel, t].item()
            expected = value + math.sin(a * value) ** 2 / (b + 1e-9)
            assert snake(x)[0, channel, t].item() == pytest.approx(expected, rel=1e-4)


def test_batch_rows_do_not_meet():
    vocoder, mel = random_vocoder(), signal(2, VOCODER.mel_bins, 9)
    torch.testing.assert_close(vocoder(mel)[1], vocoder(mel[1:])[0], atol=1e-6, rtol=0)


def test_bfloat16_weights_give_a_float32_waveform():
    vocoder, mel = random_vocoder(), signal(1, VOCODER.mel_bins, 9)
    expected = vocoder(mel)
    rough = vocoder.to(torch.bfloat16)(mel)
    assert rough.dtype == torch.float32
    assert F.mse_loss(rough, expected).sqrt() < 0.1 * expected.std()


# ---- loading ----------------------------------------------------------------------------------------------------

FIELDS = {
    "resblock": "1",
    "upsample_rates": list(VOCODER.upsample_rates),
    "upsample_kernel_sizes": list(VOCODER.upsample_kernels),
    "resblock_kernel_sizes": list(VOCODER.resblock_kernels),
    "resblock_dilation_sizes": [list(dilations) for dilations in VOCODER.resblock_dilations],
    "activation": VOCODER.activation,
    "snake_logscale": VOCODER.snake_logscale,
    "use_bias_at_final": VOCODER.bias_at_final,
    "use_tanh_at_final": VOCODER.tanh_at_final,
    "num_mels": VOCODER.mel_bins,
    "n_fft": VOCODER.n_fft,
    "hop_size": VOCODER.hop,
    "win_size": VOCODER.win,
    "sampling_rate": VOCODER.sample_rate,
    "fmin": VOCODER.fmin,
    "fmax": VOCODER.fmax,
    "upsample_initial_channel": VOCODER.initial_channels,
}


def split(weights: dict[str, torch.Tensor], magnitude: str, direction: str) -> dict[str, torch.Tensor]:
    """The weights as a training library stores them: magnitude and direction apart, the direction at any length."""
    stored = {}
    for name, tensor in weights.items():
        if name.endswith(".weight"):
            stem = name.removesuffix("weight")
            stored[stem + magnitude] = tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.dim() - 1))
            stored[stem + direction] = 3.0 * tensor
        else:
            stored[name] = tensor
    return stored


@pytest.mark.parametrize(
    "names",
    [("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")],
)
def test_weight_norm_is_folded(tmp_path, names):
    vocoder, mel = random_vocoder(), signal(1, VOCODER.mel_bins, 9)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    torch.save({"generator": split(vocoder.state_dict(), *names)}, tmp_path / "model.pt")
    loaded = load_vocoder(tmp_path, "cpu", torch.float32)
    assert loaded.config == VOCODER
    torch.testing.assert_close(loaded(mel), vocoder(mel), atol=1e-5, rtol=0)


def test_prefers_the_converted_file(tmp_path):
    vocoder, mel = random_vocoder(), signal(1, VOCODER.mel_bins, 9)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    (tmp_path / "model.pt").write_bytes(b"not opened")
    save_file(vocoder.state_dict(), tmp_path / "model.safetensors")
    torch.testing.assert_close(load_vocoder(tmp_path, "cpu", torch.float32)(mel), vocoder(mel))


def test_a_bias_against_the_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    weights = random_vocoder(replace(VOCODER, bias_at_final=True)).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"conv_post\.bias"):
        load_vocoder(tmp_path, "cpu", torch.float32)


# ---- the spectrogram --------------------------------------------------------------------------------------------


def slaney_hz(mel: float) -> float:
    """Linear below 1 kHz (15 mels), then 27 mels to a factor of 6.4."""
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def slaney_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000, 6.4)


def plain_mel(wave: np.ndarray, config: VocoderConfig) -> np.ndarray:
    """DFT by definition, triangles of unit area."""
    edge = (config.n_fft - config.hop) // 2
    padded = np.pad(wave, edge, mode="reflect")
    inset = (config.n_fft - config.win) // 2
    window = np.zeros(config.n_fft)
    window[inset : inset + config.win] = [0.5 - 0.5 * math.cos(2 * math.pi * i / config.win) for i in range(config.win)]
    bins = np.arange(config.n_fft // 2 + 1)
    waves = np.exp(-2j * np.pi * np.outer(bins, np.arange(config.n_fft)) / config.n_fft)
    top = config.fmax or config.sample_rate / 2
    marks = np.linspace(slaney_mel(config.fmin), slaney_mel(top), config.mel_bins + 2)
    corners = [slaney_hz(mark) for mark in marks]
    rows = []
    for start in range(0, len(padded) - config.n_fft + 1, config.hop):
        magnitude = np.sqrt(np.abs(waves @ (window * padded[start : start + config.n_fft])) ** 2 + 1e-9)
        row = []
        for low, peak, high in zip(corners, corners[1:], corners[2:], strict=False):
            hz = bins * config.sample_rate / config.n_fft
            triangle = np.maximum(0, np.minimum((hz - low) / (peak - low), (high - hz) / (high - peak)))
            row.append(math.log(max(1e-5, float(triangle @ magnitude) * 2 / (high - low))))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(
    "config",
    [
        replace(VOCODER, sample_rate=8000, n_fft=64, win=64, hop=24, fmin=0.0, fmax=None),
        replace(VOCODER, sample_rate=8000, n_fft=64, win=50, hop=20, fmin=300.0, fmax=3000.0),
    ],
)
def test_mel_is_the_plain_one(config):
    wave = 0.1 * signal(203)
    found = mel_spectrogram(wave, config)
    assert found.shape == (203 // config.hop, config.mel_bins)
    np.testing.assert_allclose(found.numpy(), plain_mel(wave.double().numpy(), config), atol=1e-4)


def test_silence_is_the_floor():
    config = replace(VOCODER, sample_rate=8000, n_fft=64, win=64, hop=24, fmin=0.0, fmax=None)
    mel = mel_spectrogram(torch.zeros(240), config)
    assert mel.min().item() == pytest.approx(math.log(1e-5))


@pytest.mark.parametrize("shape", [(0,), (23,), (2, 240)])
def test_less_than_a_frame_is_refused(shape):
    config = replace(VOCODER, sample_rate=8000, n_fft=64, win=64, hop=24, fmin=0.0, fmax=None)
    with pytest.raises(AudioError, match="24 samples"):
        mel_spectrogram(torch.zeros(shape), config)
