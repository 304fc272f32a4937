"""Reading checkpoints: every way in which a file can be wrong, and what loading holds in memory."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import nn

from kimia.errors import CheckpointError, WeightsError
from kimia.model import checkpoint
from kimia.model.checkpoint import (
    fold_weight_norm,
    load_strict,
    open_checkpoint,
    resolve,
    safetensors_source,
    sharded_source,
    torch_source,
    without,
    without_prefix,
)
from tests.model.in_memory import in_memory

pytestmark = pytest.mark.unit


def source_of(**tensors):
    return {name.replace("__", "."): in_memory(tensor) for name, tensor in tensors.items()}


# ---- where the files lie ----


def test_vq_tokenizer_inside_before_beside(tmp_path):
    root = tmp_path / "model"
    beside, inside = tmp_path / checkpoint.VQ_TOKENIZER, root / checkpoint.VQ_TOKENIZER
    root.mkdir()
    beside.mkdir()
    assert open_checkpoint(root).vq_tokenizer == beside
    inside.mkdir()
    assert open_checkpoint(str(root)).vq_tokenizer == inside
    assert open_checkpoint(root, beside).vq_tokenizer == beside


def test_lacking_vq_tokenizer_is_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"THUDM/glm-4-voice-tokenizer.*--vq-tokenizer"):
        open_checkpoint(tmp_path)


def test_neither_folder_nor_hub_id(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve(str(tmp_path / "file"))


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("not a repo id")])
def test_a_hub_that_does_not_answer(monkeypatch, error):
    def fail(_, **patterns):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match="owner/name: no such local folder, and the hub does not give it"):
        resolve("owner/name")


def test_a_hub_id_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **patterns: str(tmp_path / name))
    assert resolve("owner/name") == tmp_path / "owner" / "name"


RELEASED = [
    "LICENSE",
    "README.md",
    "config.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-1-of-35.safetensors",
    "whisper-large-v3/config.json",
    "whisper-large-v3/preprocessor_config.json",
    "whisper-large-v3/model.safetensors",
]
SPOKEN = ["audio_detokenizer/config.yaml", "audio_detokenizer/model.pt", "vocoder/config.json", "vocoder/model.pt"]
UNREAD = ["assets/demo.wav", "modeling_moonshot_kimia.py", ".gitattributes"]


@pytest.mark.parametrize("detokenizer", [True, False])
def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path, detokenizer):
    fetched = {}

    def download(name, *, allow_patterns, ignore_patterns):
        files = filter_repo_objects(
            RELEASED + SPOKEN + UNREAD, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        fetched[name] = list(files)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = open_checkpoint("owner/name", detokenizer=detokenizer)
    assert found.vq_tokenizer == tmp_path / checkpoint.HUB_VQ_TOKENIZER
    assert fetched["owner/name"] == RELEASED + SPOKEN * detokenizer


# ---- safetensors ----


def write_shards(folder, shards, extra=()):
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors} | dict(extra)
    (folder / checkpoint.SHARD_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_irregular_shards_follow_the_weight_map(tmp_path):
    shards = {"model-1-of-35.safetensors": {"a": torch.ones(2)}, "model-36-of-36.safetensors": {"b": torch.zeros(3)}}
    write_shards(tmp_path, shards)
    save_file({"stray": torch.ones(1)}, tmp_path / "model-2-of-35.safetensors")  # not in the map: not ours
    source = sharded_source(tmp_path)
    assert {name: item.shape for name, item in source.items()} == {"a": (2,), "b": (3,)}
    assert torch.equal(source["a"].read(), torch.ones(2))


def test_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, {"one.safetensors": {"a": torch.ones(2)}}, {"b": "two.safetensors"}.items())
    with pytest.raises(CheckpointError, match=r"lacks two\.safetensors.*download is incomplete"):
        sharded_source(tmp_path)


def test_tensor_promised_by_the_index_is_absent(tmp_path):
    write_shards(tmp_path, {"one.safetensors": {"a": torch.ones(2)}}, {"b": "one.safetensors"}.items())
    with pytest.raises(WeightsError, match="the shards lack b"):
        sharded_source(tmp_path)


def test_tensor_that_the_index_does_not_name(tmp_path):
    write_shards(tmp_path, {"one.safetensors": {"a": torch.ones(2)}})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match="does not name: b"):
        sharded_source(tmp_path)


def test_tensor_that_two_shards_hold(tmp_path):
    write_shards(tmp_path, {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.ones(2)}})
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(WeightsError, match="does not name: a"):
        sharded_source(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 200_000, "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}'],
)
def test_broken_index(tmp_path, text):
    (tmp_path / checkpoint.SHARD_INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        sharded_source(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file; the download is incomplete"):
        sharded_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="download is incomplete"):
        safetensors_source(path)


def test_pointer_instead_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        safetensors_source(path)


# ---- torch archives ----


class Payload:
    """Would run code when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("form", ["archive", "legacy", "pickle", "inside"])
def test_pickle_payload_is_refused_and_not_run(tmp_path, form):
    path, mark = tmp_path / "model.pt", tmp_path / "pwned"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        content = {"state_dict": {"a": torch.ones(2), "b": Payload(mark)} if form == "inside" else Payload(mark)}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(CheckpointError, match="refused"):
        torch_source(path, "state_dict")
    assert not mark.exists()


def test_legacy_archive_says_what_to_do(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6.*save it again"):
        torch_source(path, "state_dict")


def test_broken_archives(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"a": torch.ones(100)}}, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no torch archive"):
            torch_source(path, "state_dict")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as a torch archive"):
        torch_source(path, "state_dict")
    with pytest.raises(CheckpointError, match="no such file"):
        torch_source(tmp_path / "absent.pt", "state_dict")


def test_damaged_bytes_never_give_another_error(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"a": torch.ones(100)}}, path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(torch.randint(600, (1,), generator=generator))] ^= 1 + int(
            torch.randint(255, (1,), generator=generator)
        )
        path.write_bytes(damaged)
        try:
            torch_source(path, "state_dict")
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("content", [[1], {"other": {}}, {"state_dict": 3}, {"state_dict": {"a": 3}}])
def test_archive_without_tensors_under_the_key(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no tensors under the key 'state_dict'"):
        torch_source(tmp_path / "model.pt", "state_dict")


def test_what_is_no_tensor_is_left_out(tmp_path):
    content = {"a": torch.ones(2), "epoch": 3, "history": [1.0], 7: torch.ones(1), "nothing": None}
    torch.save({"state_dict": content, "step": 5}, tmp_path / "model.pt")
    assert list(torch_source(tmp_path / "model.pt", "state_dict")) == ["a"]


def test_remapped_archive_reads_the_same(tmp_path, monkeypatch):
    tensors = {str(index): torch.randn(50) for index in range(6)}
    torch.save({"state_dict": tensors}, tmp_path / "model.pt")
    monkeypatch.setattr(checkpoint, "MAPPED_BYTES", 1)  # a new mapping for every tensor
    source = torch_source(tmp_path / "model.pt", "state_dict")
    assert all(torch.equal(source[name].read(), tensor) for name, tensor in tensors.items())


# ---- from source to source ----


def test_prefixes_and_filters():
    source = source_of(model__encoder__a=torch.ones(1), model__decoder__b=torch.ones(2))
    assert list(without(source, r"\.decoder\.")) == ["model.encoder.a"]
    assert list(without_prefix(without(source, "decoder"), "model.encoder.", "encoder.")) == ["a"]


def test_both_prefixed_and_plain_is_refused():
    with pytest.raises(WeightsError, match="both with and without"):
        without_prefix(source_of(encoder__a=torch.ones(1), a=torch.ones(1)), "encoder.")


@pytest.mark.parametrize("names", [("weight_g", "weight_v"), ("original0", "original1")])
def test_weight_norm_is_folded_over_all_dimensions_but_the_first(names):
    stem = "conv." if names[0] == "weight_g" else "conv.parametrizations.weight."
    g, v = torch.rand(3, 1, 1) + 0.5, torch.randn(3, 4, 5)
    source = {stem + names[0]: in_memory(g), stem + names[1]: in_memory(v), "conv.bias": in_memory(torch.ones(3))}
    folded = fold_weight_norm(source)
    assert set(folded) == {"conv.weight", "conv.bias"}
    expected = torch.stack([g[i, 0, 0] * v[i] / (v[i] ** 2).sum().sqrt() for i in range(3)])
    assert folded["conv.weight"].shape == (3, 4, 5)
    torch.testing.assert_close(folded["conv.weight"].read(), expected)


def test_a_magnitude_of_another_shape_is_refused():
    source = {"conv.weight_g": in_memory(torch.ones(1)), "conv.weight_v": in_memory(torch.ones(3, 4))}
    with pytest.raises(WeightsError, match=r"conv\.: .*\(1,\) instead of \(3, 1\)"):
        fold_weight_norm(source)


def test_half_a_weight_norm_is_left_for_strictness():
    source = {"conv.weight_g": in_memory(torch.ones(1))}
    assert set(fold_weight_norm(source)) == {"conv.weight_g"}


# ---- into a module ----


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(2, 3)
        self.register_buffer("filter", torch.empty(4))


def meta_pair():
    with torch.device("meta"):
        return Pair()


def fitting():
    return {
        "one.weight": in_memory(torch.randn(3, 2)),
        "one.bias": in_memory(torch.randn(3).bfloat16()),
        "filter": in_memory(torch.randn(4).half()),
    }


def load(module, source, dtype=torch.float32):
    load_strict(module, source, "model", device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_fills_parameters_and_buffers(dtype):
    module, source = meta_pair(), fitting()
    load(module, source, dtype)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, source[name].read().to(dtype))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_all_misfits_are_listed_and_nothing_is_read():
    def explode():
        raise AssertionError("read before the check")

    source = {name: checkpoint.Stored(item.shape, item.dtype, explode) for name, item in fitting().items()}
    source["extra.key"] = source.pop("one.bias")
    source["one.weight"] = checkpoint.Stored((2, 3), "float32", explode)
    with pytest.raises(WeightsError) as caught:
        load(meta_pair(), source)
    message = str(caught.value)
    for part in (
        "model: ",
        "missing: one.bias",
        "unknown: extra.key",
        "wrong shape: one.weight (2, 3) instead of (3, 2)",
    ):
        assert part in message


def test_many_misfits_are_counted():
    with pytest.raises(WeightsError, match="and 12 more"):
        load(meta_pair(), fitting() | {f"x{index}": in_memory(torch.ones(1)) for index in range(20)})


def test_integers_are_no_weights():
    with pytest.raises(WeightsError, match="no floating-point numbers: filter int64"):
        load(meta_pair(), fitting() | {"filter": in_memory(torch.ones(4, dtype=torch.int64))})


def test_the_module_does_not_share_memory_with_the_source():
    module, source = meta_pair(), fitting()
    before = source["one.weight"].read().clone()
    load(module, source)
    source["one.weight"].read().zero_()
    assert torch.equal(module.one.weight, before)


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from kimia.model import checkpoint
checkpoint.MAPPED_BYTES = 16 << 20
torch.set_num_threads(1)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

with torch.device("meta"):
    module = nn.ModuleList(nn.Linear(2048, 1024, bias=False) for _ in range(12))  # 8 MB each in float32
folder = Path(sys.argv[1])
before = status("VmRSS")
source = checkpoint.torch_source(folder / "model.pt", "k") if sys.argv[2] == "pt" else checkpoint.sharded_source(folder)
checkpoint.load_strict(module, source, "x", device="cpu", dtype=torch.float32)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("form", ["pt", "shards"])
def test_loading_holds_no_more_than_a_shard_above_the_model(tmp_path, form):
    tensors = {f"{index}.weight": torch.full((1024, 2048), float(index)) for index in range(12)}
    if form == "pt":
        torch.save({"k": tensors}, tmp_path / "model.pt")
    else:
        names = list(tensors)
        write_shards(
            tmp_path, {f"{part}.safetensors": {n: tensors[n] for n in names[part::4]} for part in range(4)}
        )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), form], capture_output=True, text=True, check=True, timeout=100
    )
    model, shard, slack = 12 * 8, 3 * 8, 12
    assert model - 1 < float(done.stdout) < model + shard + slack
