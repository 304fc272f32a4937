"""Every trainer as it is called: from a corpus to weights in a checkpoint folder, and from those on."""

import sys

import pytest
import torch

from kimia.errors import CheckpointError
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import open_checkpoint
from kimia.model.dit import load_dit
from kimia.model.vq import load_vq
from kimia.model.whisper import load_whisper
from training import encoders, flow, vocoder, vq
from training.codebook import Recipe
from training.config import write_configs
from training.corpus import pack, write_list
from training.loop import Loop, Plan
from training.smoke import tones
from training.states import keep_states
from training.study import TaughtCodes
from training.teacher import TEACHER_WIDTH

pytestmark = pytest.mark.unit


class Ear:
    """A teacher that hears noise."""

    def hear(self, wave):
        return torch.randn(-(-len(wave) // 320), TEACHER_WIDTH, generator=torch.Generator().manual_seed(len(wave)))


@pytest.fixture(scope="module")
def room(tmp_path_factory, configs):
    """A folder with a corpus of tones, what a teacher heard of it, and a study's run."""
    folder = tmp_path_factory.mktemp("room")
    clips = [tones(("hibari", "flite-slt")[n % 2], text, 6 + n, n) for n, text in enumerate(("a", "b", "c", "d"))]
    write_list(folder / "corpus", [clip.item for clip in clips])
    pack(folder / "corpus", clips)
    keep_states(folder / "corpus", clips, Ear(), 128000)
    study = TaughtCodes(512, configs.vq.encoder.d_model, configs.flow.mel_bins, Recipe(0))
    study.book.begin(torch.randn(512, configs.vq.encoder.d_model), rounds=1)
    Loop("study", study, lambda step: {}, Plan(1, 1e-3), folder / "study").save()
    return folder


def train(room, monkeypatch, trainer, run, *more):
    """Call a trainer for one step."""
    words = [
        "--corpus",
        room / "corpus",
        "--run",
        room / run,
        "--checkpoint",
        room / "micro",
        "--steps",
        1,
        "--batch",
        2,
        "--device",
        "cpu",
        "--workers",
        0,
    ]
    monkeypatch.setattr(sys, "argv", [trainer.__name__, *map(str, [*words, *more])])
    trainer.main()


def parts(root):
    """What lies in a checkpoint folder, as serving loads it."""
    checkpoint = open_checkpoint(root)
    yield load_whisper(checkpoint.whisper, 4, "cpu", torch.float32)
    yield load_vq(checkpoint.vq_tokenizer, "cpu")
    yield load_dit(checkpoint.flow, "cpu", torch.float32)
    yield load_vocoder(checkpoint.vocoder, "cpu", torch.float32)


def test_a_run_begins_with_a_checkpoint_and_ends_in_one(room, monkeypatch, configs):
    begun = room / "begun"
    write_configs(begun)
    encoders.write_encoder(begun, encoders.EncoderTraining(configs.whisper, configs.whisper_features))
    tokenizer = vq.VQTraining(configs.vq, configs.vq_features, configs.flow, Recipe(0))
    tokenizer.book.begin(torch.randn(512, configs.vq.encoder.d_model), rounds=1)
    vq.write_vq(begun, tokenizer)
    flow.write_flow(begun, flow.FlowTraining(configs.flow))
    vocoder.write_vocoder(begun, vocoder.VocoderTraining(configs.vocoder, configs.flow))
    for trainer in (encoders, vq, flow, vocoder):
        more = ("--study", room / "study") if trainer is vq else ()
        train(room, monkeypatch, trainer, trainer.__name__, "--start", begun, "--rate", 1e-9, *more)
    for before, after in zip(parts(begun), parts(room / "micro"), strict=True):
        for name, value in before.state_dict().items():
            if name != "codebook.weight":  # follows the states, whatever the rate
                torch.testing.assert_close(after.state_dict()[name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_the_tokenizer_begins_with_the_checkpoint_s_encoder(room, monkeypatch, configs):
    write_configs(room / "micro")
    encoder = encoders.EncoderTraining(configs.whisper, configs.whisper_features)
    encoders.write_encoder(room / "micro", encoder)
    train(room, monkeypatch, vq, "vq", "--study", room / "study", "--rate", 1e-9)
    made = load_vq(open_checkpoint(room / "micro").vq_tokenizer, "cpu")
    ours = encoder.whisper.encoder.layers[2].fc1.weight
    torch.testing.assert_close(made.layers[2].fc1.weight, ours, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_other_dimensions_is_refused(room, monkeypatch, configs):
    write_configs(room / "strange")
    encoders.write_encoder(room / "strange", encoders.EncoderTraining(configs.whisper, configs.whisper_features))
    heads = room / "strange" / "training" / "encoder.safetensors"
    heads.write_bytes((room / "strange" / "whisper-large-v3" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="of other dimensions"):
        train(room, monkeypatch, encoders, "strange run", "--start", room / "strange")
