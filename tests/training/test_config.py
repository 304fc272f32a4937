"""The micro checkpoint's configs: read as those of any checkpoint, below 40 MB, the release's constants kept."""

import os

import pytest

from kimia.model.encode import AudioEncoder
from kimia.model.vq import VQTokenizer
from kimia.model.whisper import WhisperFeatures
from training.config import CODES, LIMIT_BYTES, config_files, weight_bytes, write_configs

pytestmark = pytest.mark.unit


def test_the_whole_folder_stays_below_its_limit(configs):
    text = sum(len(content.encode()) for content in config_files().values())
    assert sum(weight_bytes(configs).values()) + text < 0.97 * LIMIT_BYTES


def test_the_release_s_constants_are_kept(configs):
    assert configs.samples_per_token == 1280  # 12.5 Hz
    assert configs.lm.audio_delay == 6
    assert configs.lm.audio_codes == CODES
    assert (configs.vocoder.sample_rate, configs.vocoder.hop) == (24000, 480)
    assert not configs.lm.random_weights


def test_the_encoders_fit_together(configs):
    group = configs.lm.adaptor_input_dim // configs.whisper.d_model
    whisper = WhisperFeatures(configs.whisper, configs.whisper_features, group)
    encoder = AudioEncoder(VQTokenizer(configs.vq, configs.vq_features), whisper)
    assert encoder.samples_per_position == 1280


def test_the_folder_has_the_release_s_names(tmp_path):
    checkpoint = write_configs(tmp_path)
    assert (checkpoint.whisper / "preprocessor_config.json").is_file()
    assert (checkpoint.vq_tokenizer / "config.json").is_file()
    assert (checkpoint.flow / "config.yaml").is_file()
    assert (checkpoint.vocoder / "config.json").is_file()


def test_configs_are_replaced_whole(tmp_path):
    """Two stages may end at once, and one may read what the other writes."""
    path = write_configs(tmp_path).root / "config.json"
    with path.open(encoding="utf-8") as read_meanwhile:
        write_configs(tmp_path)
        assert path.stat().st_ino != os.fstat(read_meanwhile.fileno()).st_ino
