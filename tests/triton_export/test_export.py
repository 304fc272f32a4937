"""What stands in a model repository."""

import re

import pytest
import torch

from kimia.errors import CheckpointError, ParameterError
from kimia.model.checkpoint import open_checkpoint
from kimia.model.fingerprint import fingerprint
from kimia.triton_export import Batching, export, exported_models

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_configs_name_tensors_weights_and_batching(tiny, tmp_path) -> None:
    made = export(open_checkpoint(tiny), tmp_path / "a", GPU, torch.bfloat16, Batching(16, 500))
    assert {path.name for path in made} == {model.hosted.name for model in exported_models(open_checkpoint(tiny))}
    whisper = (tmp_path / "a" / "kimia_whisper" / "config.pbtxt").read_text()
    assert 'input [ { name: "WAVE" data_type: TYPE_FP32 dims: [-1] allow_ragged_batch: true } ]' in whisper
    assert "data_type: TYPE_BF16 dims: [-1, " in whisper
    config = (tmp_path / "a" / "kimia_vocoder" / "config.pbtxt").read_text()
    for line in (
        'name: "kimia_vocoder"',
        'backend: "python"',
        "max_batch_size: 16",
        'input [ { name: "MEL" data_type: TYPE_FP32 dims: [80, -1] } ]',
        'output [ { name: "WAVE" data_type: TYPE_FP32 dims: [-1] } ]',
        "instance_group [ { count: 1 kind: KIND_GPU } ]",
        "dynamic_batching { max_queue_delay_microseconds: 500 }",
        f'parameters {{ key: "fingerprint" value: {{ string_value: "{fingerprint([tiny / "vocoder"])}" }} }}',
        f'parameters {{ key: "model" value: {{ string_value: "{tiny}" }} }}',
    ):
        assert line in config.splitlines()


def test_the_library_of_the_client_reads_the_configs(tiny, tmp_path) -> None:
    config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    odd = tmp_path / 'a "quoted" näme'
    odd.symlink_to(tiny)
    for path in export(open_checkpoint(odd), tmp_path / "b", CPU, torch.float32, Batching()):
        config = text_format.Parse((path / "config.pbtxt").read_text(), config_pb2.ModelConfig())
        assert config.name == path.name
        assert config.parameters["model"].string_value == str(tiny)


def test_what_is_there_is_never_touched(tiny, tmp_path) -> None:
    export(open_checkpoint(tiny), tmp_path, CPU, torch.float32, Batching())
    with pytest.raises(ParameterError, match=re.escape(str(tmp_path)) + ".*there already; name another folder"):
        export(open_checkpoint(tiny), tmp_path, CPU, torch.float32, Batching())


def test_a_file_is_no_place_for_a_repository(tiny, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"kimia_vq: cannot be written"):
        export(open_checkpoint(tiny), tmp_path / "file", CPU, torch.float32, Batching())


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"delay_microseconds": -1}])
def test_impossible_batches(wrong) -> None:
    with pytest.raises(ParameterError, match="at least one row"):
        Batching(**wrong)


def test_a_checkpoint_without_a_part(tiny_copy, tmp_path) -> None:
    (tiny_copy / "vocoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocoder/config\.json"):
        export(open_checkpoint(tiny_copy), tmp_path / "c", CPU, torch.float32, Batching())
    assert not (tmp_path / "c").exists()
