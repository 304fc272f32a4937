"""Files are written tensor by tensor, readable by the official libraries, and whole or not at all."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kimia.errors import CheckpointError
from kimia.model.checkpoint import Stored, safetensors_source, torch_source
from kimia.model.writing import stored_bytes, whole_file, whole_folder, write_safetensors, write_torch
from tests.model.in_memory import in_memory

pytestmark = pytest.mark.unit


def tensors():
    return {
        "z.half": torch.randn(3, 5).half(),
        "a.bf16": torch.randn(7).bfloat16(),
        "m.single": torch.randn(2, 3, 4),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(4, 6).T,
    }


def test_safetensors_round_trip(tmp_path):
    written, counted = tensors(), []
    source = {name: in_memory(tensor) for name, tensor in written.items()}
    write_safetensors(tmp_path / "x.safetensors", source, {"format": "pt"}, counted.append)
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(written)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in written.items())
    assert sum(counted) == sum(tensor.nbytes for tensor in written.values())
    ours = safetensors_source(tmp_path / "x.safetensors")
    assert {name: item.dtype for name, item in ours.items()} == {name: item.dtype for name, item in source.items()}


def test_values_are_aligned_to_their_size(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": in_memory(torch.ones(3).half()), "b": in_memory(torch.ones(3))})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["a"]["data_offsets"][0] % 2 == 0
    assert header["b"]["data_offsets"][0] % 4 == 0


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_metadata_is_written_or_absent(tmp_path, metadata):
    write_safetensors(tmp_path / "x.safetensors", {"a": in_memory(torch.ones(1))}, metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_stored_dtype_decides(tmp_path):
    source = {"a": Stored((2,), "bfloat16", lambda: torch.tensor([1.0, 1 / 3]))}
    write_safetensors(tmp_path / "x.safetensors", source)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.tensor([1.0, 1 / 3]).bfloat16())


def test_torch_round_trip(tmp_path):
    written = {"b": torch.randn(3, 4), "a": torch.randn(5), "scalar": torch.randn(())}
    write_torch(tmp_path / "model.pt", "state_dict", {name: in_memory(tensor) for name, tensor in written.items()})
    plain = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(plain[name], tensor) for name, tensor in written.items())
    assert {name: item.shape for name, item in torch_source(tmp_path / "model.pt", "state_dict").items()} == {
        name: tuple(tensor.shape) for name, tensor in written.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]  # no scratch left


def test_stored_bytes():
    assert stored_bytes((3, 5), "bfloat16") == 30
    assert stored_bytes((), "float32") == 4


def interrupted(writing):
    with writing as partial:
        (partial / "half" if partial.is_dir() else partial).write_text("half")
        raise RuntimeError


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(RuntimeError):
        interrupted(whole_file(path))
    assert list(tmp_path.iterdir()) == []
    with whole_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_complete(tmp_path):
    folder = tmp_path / "deep" / "new"
    with pytest.raises(RuntimeError):
        interrupted(whole_folder(folder))
    assert list(folder.parent.iterdir()) == []
    with whole_folder(folder) as partial:
        (partial / "all").touch()
    assert [path.name for path in folder.iterdir()] == ["all"]
    assert [path.name for path in folder.parent.iterdir()] == ["new"]


def test_an_empty_folder_is_filled_a_full_one_refused(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    with whole_folder(folder) as partial:
        (partial / "all").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"), whole_folder(folder):
        pass
    with pytest.raises(CheckpointError, match="exists and is not empty"), whole_folder(folder / "all"):
        pass
    assert [path.name for path in folder.iterdir()] == ["all"]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"), whole_folder(tmp_path / "file" / "new"):
        pass


@pytest.mark.parametrize("writing", [whole_file, whole_folder])
def test_a_name_too_long_for_the_disk(tmp_path, writing):
    with writing(tmp_path / ("x" * 255)) as partial:  # what is partial must not need a longer one
        if writing is whole_folder:
            (partial / "all").touch()
    with (
        pytest.raises(CheckpointError, match=r"x: cannot be written \(File name too long\)"),
        writing(tmp_path / ("x" * 256)),
    ):
        pass
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_a_file_in_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be written.*name a place"), whole_file(tmp_path / "no" / "file"):
        pass


@pytest.fixture
def small_files():
    """Files may not grow above 64 kB: the closest thing to a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_no_room(tmp_path):
    source = {"a": in_memory(torch.zeros(1 << 15))}
    with pytest.raises(CheckpointError, match="cannot be written"), whole_file(tmp_path / "x") as partial:
        write_safetensors(partial, source)
    with pytest.raises(CheckpointError, match="cannot be written"), whole_folder(tmp_path / "new") as partial:
        write_torch(partial / "model.pt", "k", source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
def test_no_room_for_the_archive_itself(tmp_path):
    source = {"a": in_memory(torch.zeros((1 << 14) - 8))}  # its scratch just fits, the archive does not
    with pytest.raises(CheckpointError, match="cannot be written"), whole_folder(tmp_path / "new") as partial:
        write_torch(partial / "model.pt", "k", source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["itself", "link", "dot"])
def test_an_existing_empty_folder_stays_the_same_folder(tmp_path, monkeypatch, way):
    folder = tmp_path / "new"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    with whole_folder({"itself": folder, "link": tmp_path / "link", "dot": Path()}[way]) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "all").touch()
        assert not (folder / "deep").exists()
    assert [path.name for path in folder.iterdir()] == ["deep"]
    assert os.listdir() == ["deep"]
    assert folder.stat().st_ino == before
    assert (tmp_path / "link").is_symlink()


def test_a_link_is_replaced_not_written_through(tmp_path):
    (tmp_path / "blob").write_text("old")
    (tmp_path / "x").symlink_to("blob")
    with whole_file(tmp_path / "x") as partial:
        partial.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    assert (tmp_path / "blob").read_text() == "old"


def test_links_that_go_round(tmp_path):
    (tmp_path / "x").symlink_to("x")
    with pytest.raises(CheckpointError, match="cannot be written"), whole_folder(tmp_path / "x") as partial:
        (partial / "all").touch()
