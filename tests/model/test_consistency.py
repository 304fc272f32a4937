"""Parts that do not belong together are refused before any weight is read."""

import json

import pytest
import yaml

from kimia.errors import CheckpointError, ConfigError
from kimia.model.checkpoint import open_checkpoint
from kimia.model.consistency import read_configs

pytestmark = pytest.mark.unit

VQ, WHISPER = "glm-4-voice-tokenizer", "whisper-large-v3"


def change(path, **fields):
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(values))


def test_a_consistent_checkpoint(tiny):
    configs = read_configs(open_checkpoint(tiny))
    assert configs.samples_per_token == 1280
    assert configs.flow.audio_codes == configs.vq.codebook_size == configs.lm.audio_codes


@pytest.mark.parametrize(
    ("file", "fields", "names"),
    [
        (
            f"{VQ}/config.json",
            {"quantize_vocab_size": 500},
            ("quantize_vocab_size", "500", "kimia_token_offset", "512"),
        ),
        (f"{VQ}/config.json", {"pooling_kernel_size": 2}, ("samples per token", "640", "samples per feature", "1280")),
        (f"{VQ}/config.json", {"num_mel_bins": 80}, ("num_mel_bins", "80", "feature_size", "128")),
        (f"{VQ}/preprocessor_config.json", {"sampling_rate": 8000}, ("sampling_rate", "8000", "16000")),
        (
            f"{VQ}/preprocessor_config.json",
            {"chunk_length": 60},
            ("3000 encoder frames", "max_source_positions is 1500"),
        ),
        (f"{WHISPER}/preprocessor_config.json", {"feature_size": 80}, ("feature_size", "80", "num_mel_bins", "128")),
        (f"{WHISPER}/config.json", {"d_model": 60}, ("kimia_adaptor_input_dim", "256 is not a multiple of 60")),
        (f"{WHISPER}/config.json", {"d_model": 128}, ("samples per token", "1280", "640")),
        ("config.json", {"kimia_adaptor_input_dim": 128}, ("samples per feature", "640")),
        ("config.json", {"vocab_size": 1500}, ("vocab_size", "quantize_vocab_size")),
        ("vocoder/config.json", {"num_mels": 100}, ("input_size", "80", "num_mels", "100")),
    ],
)
def test_parts_that_do_not_fit(tiny_copy, file, fields, names):
    change(tiny_copy / file, **fields)
    with pytest.raises(ConfigError) as caught:
        read_configs(open_checkpoint(tiny_copy))
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert str(tiny_copy / file) in str(caught.value)


def test_flow_model_of_another_codebook(tiny_copy):
    path = tiny_copy / "audio_detokenizer/config.yaml"
    values = yaml.safe_load(path.read_text())
    values["model"]["dit"]["semantic_vocab_size"] = 16384
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"config\.yaml: semantic_vocab_size is 16384, .*config\.json.* is 512"):
        read_configs(open_checkpoint(tiny_copy))


def test_the_detokenizer_is_not_opened_unless_wanted(tiny_copy):
    for name in ("audio_detokenizer", "vocoder"):
        for path in (tiny_copy / name).iterdir():
            path.unlink()
    configs = read_configs(open_checkpoint(tiny_copy), detokenizer=False)
    assert configs.flow is None
    assert configs.vocoder is None
    with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read"):
        read_configs(open_checkpoint(tiny_copy))
