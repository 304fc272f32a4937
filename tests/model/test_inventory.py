"""Looking into a checkpoint: everything is found, and every fault is reported beside the rest."""

import json

import pytest
import torch

from kimia.model.checkpoint import open_checkpoint
from kimia.model.config import LMConfig
from kimia.model.inventory import take_inventory
from kimia.model.layout import language_model, parameters

pytestmark = pytest.mark.unit

NAMES = ["language model", "whisper encoder", "vq tokenizer", "flow matching", "vocoder"]


def test_a_sound_checkpoint(tiny):
    inventory = take_inventory(open_checkpoint(tiny), measure=True)
    parts = {part.name: part for part in inventory.parts}
    assert list(parts) == NAMES
    assert not inventory.problems
    lm = parts["language model"]
    assert lm.parameters == parameters(language_model(LMConfig.read(tiny / "config.json")))
    assert lm.stored == {"bfloat16": sum(part.bytes for part in planned_shards())}
    assert lm.files["tiktoken.model"] == (tiny / "tiktoken.model").stat().st_size
    assert lm.dimensions["audio_delay"] == 6
    assert parts["whisper encoder"].stored.keys() == {"float16"}
    assert all(0 < part.load_seconds < 60 for part in inventory.parts)
    assert inventory.bytes == sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file())
    assert inventory.special_tokens["msg_end"] == 462 + 2


def planned_shards():
    from kimia.model.checkpoint_presets import PRESETS
    from kimia.model.random_weights import plan

    return [file for file in plan(PRESETS["tiny"]) if len(file.path.parts) == 1]


def test_the_vq_tokenizer_licence_is_told(tiny):
    parts = {part.name: part for part in take_inventory(open_checkpoint(tiny), measure=False).parts}
    assert "registration" in parts["vq tokenizer"].licence
    assert "Built with glm-4" in parts["vq tokenizer"].licence
    assert all(part.licence for part in parts.values())


def test_looking_without_loading(tiny):
    inventory = take_inventory(open_checkpoint(tiny), measure=False)
    assert [part.load_seconds for part in inventory.parts] == [None] * 5
    assert all(part.parameters for part in inventory.parts)


def test_faults_are_reported_beside_the_rest(tiny_copy):
    (tiny_copy / "model-3-of-9.safetensors").unlink()
    (tiny_copy / "vocoder/model.pt").write_bytes(b"")
    config = tiny_copy / "glm-4-voice-tokenizer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantize_vocab_size": 7}))
    inventory = take_inventory(open_checkpoint(tiny_copy), measure=True)
    problems = {part.name: part.problem for part in inventory.parts}
    assert "model-3-of-9.safetensors" in problems["language model"]
    assert "no torch archive" in problems["vocoder"]
    assert "codebook.weight (512, 64) instead of (7, 64)" in problems["vq tokenizer"]
    assert problems["whisper encoder"] is None
    assert problems["flow matching"] is None
    assert any("quantize_vocab_size is 7" in problem for problem in inventory.problems)
    assert len(inventory.problems) == 4


def test_an_empty_folder_is_no_crash(tmp_path):
    (tmp_path / "glm-4-voice-tokenizer").mkdir()
    inventory = take_inventory(open_checkpoint(tmp_path), measure=True)
    assert all(part.problem for part in inventory.parts)
    assert all(part.parameters is None for part in inventory.parts)


DAMAGE = {
    "extra key": lambda tensors: tensors | {"surplus": torch.ones(1)},
    "missing key": lambda tensors: {name: tensors[name] for name in list(tensors)[1:]},
    "wrong shape": lambda tensors: tensors | {next(iter(tensors)): torch.ones(1)},
    "integers": lambda tensors: tensors | {next(iter(tensors)): tensors[next(iter(tensors))].long()},
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("part", "prefix", "key"), [(3, "speech_model.", "state_dict"), (4, "", "generator")])
def test_damaged_archives(tiny_copy, damage, part, prefix, key):
    path = tiny_copy / ("audio_detokenizer" if part == 3 else "vocoder") / "model.pt"
    tensors = torch.load(path, weights_only=True)[key]
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    torch.save({key: {prefix + name.removeprefix(prefix): t for name, t in DAMAGE[damage](kept).items()}}, path)
    inventory = take_inventory(open_checkpoint(tiny_copy), measure=False)
    assert [index for index, item in enumerate(inventory.parts) if item.problem] == [part]
    assert inventory.parts[part].problem in inventory.problems
