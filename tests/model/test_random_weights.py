"""Random checkpoints: the released layout without writing it, and a tiny one that every part of the model loads."""

import json
import math
from pathlib import PurePosixPath

import pytest
import torch

from kimia.errors import CheckpointError, ParameterError
from kimia.model import layout
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import SHARD_INDEX, open_checkpoint, safetensors_source, sharded_source, torch_source
from kimia.model.checkpoint_presets import PRESETS
from kimia.model.config import LMConfig
from kimia.model.random_weights import new_checkpoint, plan
from kimia.pipeline import KimiAudio
from tests.golden_data import golden

pytestmark = pytest.mark.unit

SPEECH = [{"role": "user", "message_type": "text", "content": "Tell me about bananas."}]


@pytest.fixture(scope="module")
def released():
    return {str(file.path): file for file in plan(PRESETS["7b"])}


def of_language_model(files):
    return [file for file in files.values() if file.path.parent == PurePosixPath()]


def test_released_shards(released):
    shards = of_language_model(released)
    names = [f"model-{index}-of-35.safetensors" for index in range(1, 36)] + ["model-36-of-36.safetensors"]
    assert [str(file.path) for file in shards] == names
    assert sum(len(file.tensors) for file in shards) == 453
    assert sum(file.bytes for file in shards) == 19_532_673_280
    assert {dtype for file in shards for _, dtype in file.tensors.values()} == {"bfloat16"}
    assert set(shards[-1].tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "mimo_output.weight",
        "model.mimo_norm.weight",
    }


def test_released_rotary_leftovers(released):
    leftovers = {
        name: item for file in of_language_model(released) for name, item in file.tensors.items() if "rotary" in name
    }
    assert len(leftovers) == 34
    assert set(leftovers.values()) == {((64,), "bfloat16")}
    assert "model.mimo_layers.5.self_attn.rotary_emb.inv_freq" in leftovers


def test_released_parts(released):
    whisper = released["whisper-large-v3/model.safetensors"].tensors
    assert len(whisper) == 487
    assert all(name.startswith("model.encoder.") for name in whisper)
    vq = released["glm-4-voice-tokenizer/model.safetensors"].tensors
    assert len(vq) == 249
    assert {"conv1.weight", "ema_count", "ema_weight"} <= set(vq)
    flow = released["audio_detokenizer/model.pt"]
    assert flow.torch_key == "state_dict"
    assert [name for name in flow.tensors if not name.startswith("speech_model.")] == ["resampler.kernel"]
    vocoder = released["vocoder/model.pt"]
    assert vocoder.torch_key == "generator"
    assert len(vocoder.tensors) == 1206
    assert vocoder.tensors["ups.0.0.weight_g"] == ((2048, 1, 1), "float32")


def test_released_tokenizer_file_has_the_published_size(released):
    file = released["glm-4-voice-tokenizer/model.safetensors"]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(file.tensors):
        shape, _ = file.tensors[name]
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    assert 8 + text + -text % 8 + file.bytes == 1_458_374_480


def test_tiny_is_tiny(tiny):
    assert sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file()) < 20e6


def test_what_is_written_is_what_is_planned(tiny):
    for file in plan(PRESETS["tiny"]):
        path = tiny / file.path
        source = safetensors_source(path) if file.torch_key is None else torch_source(path, file.torch_key)
        assert {name: (item.shape, item.dtype) for name, item in source.items()} == file.tensors


def test_index_has_the_release_form(tiny):
    index = json.loads((tiny / SHARD_INDEX).read_text())
    assert set(index["weight_map"]) == set(sharded_source(tiny))
    assert index["metadata"]["total_size"] == sum(
        file.bytes for file in plan(PRESETS["tiny"]) if file.path.parent == PurePosixPath()
    )


def test_rotary_leftovers_are_bf16_roundings(tiny):
    config = LMConfig.read(tiny / "config.json")
    stored = sharded_source(tiny)["model.layers.0.self_attn.rotary_emb.inv_freq"].read()
    exact = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    assert torch.equal(stored, exact.bfloat16())
    assert not torch.equal(stored.float(), exact)


def test_vocoder_filters_are_those_of_the_golden_checkpoint(tiny):
    ours = torch_source(tiny / "vocoder/model.pt", "generator")["activation_post.upsample.filter"].read()
    theirs = torch_source(golden("e2e") / "model/vocoder/model.pt", "generator")["activation_post.upsample.filter"]
    torch.testing.assert_close(ours, theirs.read(), atol=1e-6, rtol=0)


def test_same_seed_same_weights_other_seed_others(tiny, tmp_path):
    again = new_checkpoint(tmp_path / "again", "tiny", seed=0, progress=False)
    other = new_checkpoint(tmp_path / "other", "tiny", seed=1, progress=False)
    for path in ("model-1-of-9.safetensors", "glm-4-voice-tokenizer/model.safetensors"):
        assert (again / path).read_bytes() == (tiny / path).read_bytes()
        assert (other / path).read_bytes() != (tiny / path).read_bytes()
    vocoders = [load_vocoder(folder / "vocoder", "cpu", torch.float32).state_dict() for folder in (tiny, again)]
    assert all(torch.equal(tensor, vocoders[1][name]) for name, tensor in vocoders[0].items())


def test_layers_differ(tiny):
    source = sharded_source(tiny)
    weights = [source[f"model.layers.{index}.mlp.up_proj.weight"].read() for index in range(2)]
    assert not torch.equal(*weights)


def test_refusals(tmp_path):
    with pytest.raises(ParameterError, match="preset must be one of tiny, 7b"):
        new_checkpoint(tmp_path / "x", "small")
    with pytest.raises(ParameterError, match="seed"):
        new_checkpoint(tmp_path / "x", "tiny", seed=-1)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        new_checkpoint(tmp_path / "x", "tiny")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["precious"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kimia.model.random_weights.write_torch", fail)
    with pytest.raises(KeyboardInterrupt):
        new_checkpoint(tmp_path / "x", "tiny", progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- the tiny model at work ----


@pytest.fixture(scope="module")
def model(tiny):
    return KimiAudio(tiny, device="cpu", dtype=torch.float32)


def test_every_part_loads(model):
    assert model.detokenizer is not None
    counts = [
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model.lm, model.encoder.whisper.encoder, model.detokenizer.dit)
    ]
    checkpoint = plan(PRESETS["tiny"])
    lm = sum(layout.parameters({n: s for n, (s, _) in file.tensors.items() if "rotary" not in n})
             for file in checkpoint if file.path.parent == PurePosixPath())  # fmt: skip
    assert counts[0] == lm
    assert min(counts) > 10_000


def test_speech_is_audible_and_does_not_clip(model):
    wav, text = model.generate(SPEECH, "both", max_new_tokens=60, seed=3, audio_temperature=0.8, audio_top_k=10)
    assert wav is not None
    assert wav.shape[-1] > model.sample_rate
    assert torch.isfinite(wav).all()
    assert 0.02 < float(wav.square().mean().sqrt()) < 0.5
    assert float(wav.abs().max()) < 1
    assert text


def test_random_answers_vary(model):
    answers = {
        model.generate(SPEECH, "text", max_new_tokens=20, seed=seed, text_temperature=1.0)[1] for seed in range(4)
    }
    assert len(answers) == 4
    assert all(len(set(answer)) > 3 for answer in answers)


def test_recorded_speech_gives_varied_codes(model):
    recording = sorted((golden("e2e") / "audio").glob("*.wav"))[0]
    chat = [{"role": "user", "message_type": "audio", "content": str(recording)}]
    from kimia.model.audio import load_audio

    encoded = model.encoder.encode([load_audio(chat[0]["content"], model.encoder.sample_rate)])[0]
    assert len(set(encoded.codes)) > len(encoded.codes) // 5
    assert torch.isfinite(encoded.features).all()


def test_without_the_detokenizer_its_files_are_not_opened(tiny_copy):
    for name in ("audio_detokenizer", "vocoder"):
        for path in (tiny_copy / name).iterdir():
            path.unlink()
    model = KimiAudio(open_checkpoint(tiny_copy).root, load_detokenizer=False, device="cpu")
    assert model.generate(SPEECH, "both", max_new_tokens=4, seed=0)[0] is None
