"""Every trainer for a few steps, and a whole folder that loads: `python -m training.smoke`.

Speech is stood for by tones, so nothing has to be installed and it ends in a minute. The folder that comes out has
exactly the files of a micro checkpoint and knows nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kimia.errors import ConfigError
from kimia.model.checkpoint import VQ_TOKENIZER, Checkpoint
from kimia.model.detokenize import Detokenizer
from kimia.model.encode import AudioEncoder
from kimia.model.lm import load_lm
from kimia.model.text import TextTokenizer
from training.codebook import Recipe
from training.config import LIMIT_BYTES, MicroConfigs, trainer_configs, write_configs
from training.corpus import TOKEN_SAMPLES, Clip, Item
from training.encoders import EncoderTraining, write_encoder
from training.flow import FlowTraining, write_flow
from training.hearing import Hearing
from training.language_model import LanguageTraining, lesson, write_language_model
from training.loop import CPU, Loop, LossOf, Plan
from training.options import add_device
from training.speaking import Speaking
from training.tasks import Example, Part
from training.vocoder import VocoderTraining, write_vocoder
from training.voices import SPEAKER, SPEECH_RATE
from training.vq import VQTraining, write_vq

TEXTS = ("yes", "no", "hello", "goodbye")


def tones(voice: str, text: str, tokens: int, seed: int) -> Clip:
    """A clip whose pitch glides: no speech, but something to hear in every frame."""
    rng = np.random.default_rng(seed)
    times = np.arange(tokens * TOKEN_SAMPLES) / SPEECH_RATE
    wave = 0.3 * np.sin(2 * np.pi * times * (200 + 400 * rng.random() * times)) + 0.01 * rng.standard_normal(len(times))
    return Clip(Item("train", voice, text), (wave * 2**15).astype(np.int16))


@dataclass(frozen=True)
class Smoke:
    """One run of everything, in a folder."""

    folder: Path
    configs: MicroConfigs
    steps: int
    device: torch.device = CPU

    def loop(self, name: str, module: nn.Module, losses: LossOf) -> None:
        """A few steps of one stage."""
        plan = Plan(self.steps, 1e-3, warmup=1, report_every=1, device=self.device)
        last = Loop(name, module, losses, plan, self.folder / name).run().history[-1]
        module.cpu()  # the data of later stages are made there
        print(name, {key: round(value, 3) for key, value in last.items()})

    def run(self) -> Checkpoint:
        """Train every stage, write the folder, load it strictly."""
        configs, root = self.configs, self.folder / "micro"
        checkpoint = write_configs(root)
        clips = [tones((SPEAKER.name, "flite-slt")[n % 2], TEXTS[n % 4], 6 + n % 4, n) for n in range(8)]
        speaker = [clip for clip in clips if clip.item.voice == SPEAKER.name]

        encoder = EncoderTraining(configs.whisper, configs.whisper_features)
        windows = Hearing(clips, None, configs.whisper_features, configs, seed=1)
        self.loop("encoder", encoder, lambda step: encoder.losses(windows.windows(step, 2)))
        write_encoder(root, encoder)

        vq = VQTraining(configs.vq, configs.vq_features, configs.flow, Recipe(continuous_steps=1))
        vq.kept = [torch.randn(configs.vq.codebook_size, configs.vq.encoder.d_model).to(self.device)]
        hearing = Hearing(clips, None, configs.vq_features, configs, seed=1)
        self.loop("vq", vq, lambda step: vq.losses(hearing.batch(step, 4), step))
        write_vq(root, vq)

        speaking = Speaking(speaker, vq.finished(), configs.flow, configs.vocoder, seed=1)
        flow = FlowTraining(configs.flow)
        self.loop("flow", flow, lambda step: flow.losses(speaking.batch(step, 2), step))
        write_flow(root, flow)

        vocoder = VocoderTraining(configs.vocoder, configs.flow)
        self.loop("vocoder", vocoder, lambda step: vocoder.losses(speaking.batch(step, 1), step))
        write_vocoder(root, vocoder)

        self._language(root, speaker)
        return checkpoint

    def _language(self, root: Path, clips: list[Clip]) -> None:
        configs = self.configs
        tokenizer = TextTokenizer.load(root, configs.lm)
        encoder = AudioEncoder.load(
            Checkpoint(root, root / VQ_TOKENIZER), configs.lm.adaptor_input_dim, "cpu", torch.float32
        )
        heard = encoder.encode([clip.heard() for clip in clips])
        call = Example("talk", (Part("user", "speech", clips[0].item.text),), "hello", spoken=True)
        lessons = [lesson(call, {0: clip}, heard[0].codes, configs.lm, tokenizer) for clip in heard]
        language = LanguageTraining(configs.lm)
        self.loop("language model", language, lambda step: language.losses(lessons))  # noqa: ARG005 (one batch)
        write_language_model(root, language)


def load_all(checkpoint: Checkpoint, configs: MicroConfigs) -> int:
    """Load every part of a folder strictly. Bytes on disk."""
    AudioEncoder.load(checkpoint, configs.lm.adaptor_input_dim, "cpu", torch.float32)
    load_lm(checkpoint.root, device="cpu", dtype=torch.float32)
    Detokenizer.load(checkpoint, "cpu", torch.float32)
    return sum(path.stat().st_size for path in checkpoint.root.rglob("*") if path.is_file())


def main() -> None:
    """Run every trainer for a few steps."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the folder here")
    add_device(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        smoke = Smoke(options.out or Path(scratch), trainer_configs(), options.steps, options.device)
        size = load_all(smoke.run(), smoke.configs)
        print(f"loads strictly: {size / 1e6:.1f} MB of {LIMIT_BYTES / 1e6:.0f}")
        if size > LIMIT_BYTES:
            raise ConfigError(f"the folder has {size} bytes, above {LIMIT_BYTES}; shrink training.config.MICRO")


if __name__ == "__main__":
    main()
