"""BigVGAN of the speaking voice: mel and multi-resolution spectra as losses.

    python -m training.vocoder --corpus FOLDER --run FOLDER --checkpoint FOLDER

Notes
- Half of the mels are disturbed a little, so that the mels of the flow model do not surprise it.
- The low-pass filters around every Snake cost more than the rest of a step together. The first steps do without them;
  then the filters, which serving always has, are learned with at the low end of the learning rate.
- An earlier study on such a machine found: learning rate at most 4e-4, clip at 3, averaged weights; the loss falls for
  hours. Adversarial training is not here yet.

Shapes: B pieces, M mel bins, T mel frames, S = hop * T samples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.bigvgan import Activation, BigVGAN, load_vocoder, mel_spectrogram
from kimia.model.checkpoint import ARCHIVE, Source, Stored
from kimia.model.config import FlowConfig, VocoderConfig
from kimia.model.random_weights import _lowpass
from kimia.model.writing import write_torch
from training.ahead import Ahead
from training.config import trainer_configs, write_configs
from training.corpus import load_clips
from training.heads import take_over
from training.loop import Loop, averaged_weights, device_of
from training.options import leave, plan_of, trainer_parser
from training.speaking import Speaking, Spoken
from training.voices import SPEAKER

FOLDER = "vocoder"  # in a checkpoint
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256), (2048, 512))  # window and hop of each spectrum
PIECE_FRAMES = 32  # of one training piece, 0.64 s
DISTURBED = 0.5  # share of the pieces
DISTURBANCE = 0.08  # standard deviation, of normalised mels
MEL_WEIGHT = 1.0
PLAIN_SHARE = 0.75  # of the steps: before the filters come in


class VocoderTraining(nn.Module):
    """The vocoder and its losses."""

    def __init__(self, config: VocoderConfig, flow: FlowConfig, plain_steps: int = 0) -> None:
        super().__init__()
        self.config, self.flow, self.plain_steps = config, flow, plain_steps
        self.vocoder = BigVGAN(config)
        _begin(self.vocoder)

    def losses(self, spoken: Sequence[Spoken], step: int) -> dict[str, Tensor]:
        """The losses of a piece of each clip."""
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        mels, waves = zip(*[self._piece(one, rng) for one in spoken], strict=True)
        mel, wave = torch.stack(mels), torch.stack(waves)  # (B, T, M), (B, S)
        disturbed = (torch.rand(len(mel), 1, 1, generator=generator) < DISTURBED) * DISTURBANCE
        heard = mel + disturbed * torch.randn(mel.shape, generator=generator)
        device = device_of(self)
        heard, wave = heard.to(device), wave.to(device)
        filtered(self.vocoder, step >= self.plain_steps)
        made = self.vocoder((heard * self.flow.mel_std + self.flow.mel_mean).transpose(1, 2))
        return {"mel": MEL_WEIGHT * self.mel_error(made, wave), "spectra": spectra_error(made, wave)}

    def _piece(self, spoken: Spoken, rng: random.Random) -> tuple[Tensor, Tensor]:
        """A random stretch of a clip: mel (T, M) and wave (S,); a short clip is filled up with silence."""
        hop = self.config.hop
        start = rng.randrange(max(1, len(spoken.mel) - PIECE_FRAMES + 1))
        mel, wave = spoken.mel[start : start + PIECE_FRAMES], spoken.wave[start * hop : (start + PIECE_FRAMES) * hop]
        silence = (math.log(1e-5) - self.flow.mel_mean) / self.flow.mel_std
        lacking = PIECE_FRAMES - len(mel)
        return F.pad(mel, (0, 0, 0, lacking), value=silence), F.pad(wave, (0, lacking * hop))

    def mel_error(self, made: Tensor, wave: Tensor) -> Tensor:
        """Mean absolute difference of the log-mels of (B, S) and (B, S)."""
        pairs = [
            (mel_spectrogram(left, self.config), mel_spectrogram(right, self.config))
            for left, right in zip(made, wave, strict=True)
        ]
        return torch.stack([F.l1_loss(left, right) for left, right in pairs]).mean()


def filtered(vocoder: BigVGAN, filters: bool) -> None:
    """Let every Snake work at twice the rate between its filters, as in serving, or without them."""
    for layer in vocoder.modules():
        if isinstance(layer, Activation):
            layer.__dict__.pop("forward", None)
            if not filters:
                layer.forward = layer.act.forward  # type: ignore[method-assign]


def spectra_error(made: Tensor, wave: Tensor) -> Tensor:
    """Spectral convergence and log-magnitude error over all resolutions, of (B, S) and (B, S)."""
    return torch.stack([_spectrum_error(made, wave, *resolution) for resolution in RESOLUTIONS]).mean()


def _spectrum_error(made: Tensor, wave: Tensor, window: int, hop: int) -> Tensor:
    left, right = (_magnitude(wave_, window, hop) for wave_ in (made, wave))
    convergence: Tensor = (right - left).norm() / right.norm().clamp(min=1e-3)
    return convergence + F.l1_loss(left.log(), right.log())


def _magnitude(wave: Tensor, window: int, hop: int) -> Tensor:
    shape = torch.hann_window(window, device=wave.device)
    spectrum = torch.stft(wave, window, hop, window, shape, return_complex=True)
    return torch.view_as_real(spectrum).square().sum(-1).clamp(min=1e-6).sqrt()


@torch.no_grad()
def _begin(vocoder: BigVGAN) -> None:
    """Starting weights: small convolutions, snakes of frequency one, the release's low-pass filters."""
    for layer in vocoder.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            nn.init.normal_(layer.weight, std=0.6 / math.sqrt(layer.weight[0].numel()))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in vocoder.named_parameters():
        if name.endswith(("act.alpha", "act.beta")):
            nn.init.zeros_(parameter)  # logarithms
    for name, buffer in vocoder.named_buffers():
        if name.endswith("filter"):
            buffer.copy_(_lowpass(tuple(buffer.shape), buffer.dtype, torch.Generator()))


def weight_normed(vocoder: BigVGAN) -> Source:
    """The vocoder's tensors with every weight split into magnitude and direction, as the release stores them."""
    tensors: dict[str, Tensor] = {}
    for name, value in vocoder.state_dict().items():
        if name.endswith(".weight"):
            tensors[f"{name}_g"] = value.flatten(1).norm(dim=1).view(-1, *[1] * (value.dim() - 1))
            tensors[f"{name}_v"] = value
        else:
            tensors[name] = value
    return {
        name: Stored(tuple(value.shape), "float32", lambda value=value: value)  # type: ignore[misc]
        for name, value in tensors.items()
    }


def write_vocoder(root: Path, training: VocoderTraining) -> None:
    """Write the vocoder's weights into a checkpoint folder that has its config files, in the released layout."""
    write_torch(root / FOLDER / ARCHIVE, "generator", weight_normed(training.vocoder))


def read_vocoder(root: Path, training: VocoderTraining) -> None:
    """Begin with the weights of a checkpoint folder. Raises CheckpointError or WeightsError."""
    loaded = load_vocoder(root / FOLDER, "cpu", torch.float32)
    take_over(training.vocoder, loaded.state_dict(), str(root / FOLDER))


def main() -> None:
    """Train the vocoder on the speaking voice."""
    options = trainer_parser(main.__doc__, steps=4500, batch=8, rate=4e-4).parse_args()
    configs = trainer_configs()
    clips = load_clips(options.corpus, "train", SPEAKER.name)
    speaking = Speaking(clips, None, configs.flow, configs.vocoder, seed=4)
    training = VocoderTraining(configs.vocoder, configs.flow, int(PLAIN_SHARE * options.steps))
    if options.start is not None:
        read_vocoder(options.start, training)

    data = Ahead(lambda step: speaking.batch(step, options.batch), options.steps, options.workers)

    def losses(step: int) -> dict[str, Tensor]:
        return training.losses(data(step), step)

    progress = Loop("vocoder", training, losses, plan_of(options, clip=3.0), options.run).run()
    averaged_weights(options.run, training)
    write_configs(options.checkpoint)
    write_vocoder(options.checkpoint, training)
    leave("vocoder", progress, options.steps)


if __name__ == "__main__":
    main()
