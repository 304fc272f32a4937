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
from training.corpus import pack, write_list
from training.loop import STATE, Loop, Plan
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
    ]
    monkeypatch.setattr(sys, "argv", [trainer.__name__, *map(str, [*words, *more])])
    trainer.main()
    return torch.load(room / run / STATE, weights_only=True)["module"]


def test_each_stage_ends_in_the_checkpoint_and_begins_from_one(room, monkeypatch):
    train(room, monkeypatch, encoders, "encoder")
    train(room, monkeypatch, vq, "vq", "--study", room / "study")
    train(room, monkeypatch, flow, "flow")
    train(room, monkeypatch, vocoder, "vocoder")
    checkpoint = open_checkpoint(room / "micro")
    parts = {
        (encoders, "whisper."): load_whisper(checkpoint.whisper, 4, "cpu", torch.float32),
        (vq, "tokenizer."): load_vq(checkpoint.vq_tokenizer, "cpu"),
        (flow, "dit."): load_dit(checkpoint.flow, "cpu", torch.float32),
        (vocoder, "vocoder."): load_vocoder(checkpoint.vocoder, "cpu", torch.float32),
    }
    for (trainer, prefix), part in parts.items():
        more = ("--study", room / "study") if trainer is vq else ()
        begun = train(room, monkeypatch, trainer, f"later {prefix}", "--start", room / "micro", "--rate", 1e-9, *more)
        for name, value in part.state_dict().items():
            torch.testing.assert_close(begun[prefix + name], value, atol=1e-3, rtol=1e-3, msg=prefix + name)


def test_a_checkpoint_of_other_dimensions_is_refused(room, monkeypatch, configs):
    train(room, monkeypatch, encoders, "encoder")
    path = room / "micro" / "training" / "encoder.safetensors"
    path.write_bytes((room / "micro" / "whisper-large-v3" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="of other dimensions"):
        train(room, monkeypatch, encoders, "other", "--start", room / "micro")
