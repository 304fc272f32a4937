import pytest
import torch
from torch import nn

from kimia.errors import CheckpointError
from training.heads import FOLDER, read_heads, write_heads

pytestmark = pytest.mark.unit


def heads(letters=3):
    return nn.ModuleDict({"letters": nn.Linear(4, letters), "mel": nn.Linear(4, 2)})


def test_a_later_run_begins_with_the_heads_of_the_last(tmp_path):
    written, read = heads(), heads()
    write_heads(tmp_path, "vq", written)
    assert (tmp_path / FOLDER / "vq.safetensors").is_file()
    read_heads(tmp_path, "vq", read)
    for name, value in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.half().float())


def test_heads_of_other_dimensions_are_refused(tmp_path):
    write_heads(tmp_path, "vq", heads())
    with pytest.raises(CheckpointError, match=r"vq\.safetensors"):
        read_heads(tmp_path, "vq", heads(letters=5))
