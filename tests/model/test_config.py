"""Config files: every dimension is required, and every complaint names file and field."""

import json

import pytest
import yaml

from kimia.errors import CheckpointError, ConfigError
from kimia.model.checkpoint_presets import PRESETS, text_files
from kimia.model.config import (
    EncoderConfig,
    FeatureConfig,
    FlowConfig,
    LMConfig,
    VocoderConfig,
    VQConfig,
    exact_div,
    read_fields,
)

pytestmark = pytest.mark.unit

FILES = {str(path): text for path, text in text_files(PRESETS["7b"]).items()}
READERS = {
    "config.json": LMConfig,
    "whisper-large-v3/config.json": EncoderConfig,
    "glm-4-voice-tokenizer/config.json": VQConfig,
    "glm-4-voice-tokenizer/preprocessor_config.json": FeatureConfig,
    "audio_detokenizer/config.yaml": FlowConfig,
    "vocoder/config.json": VocoderConfig,
}
REQUIRED = {
    "config.json": (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps rope_theta kimia_mimo_layers kimia_mimo_transformer_from_layer_index "
        "kimia_mimo_audiodelaytokens kimia_token_offset kimia_adaptor_input_dim kimia_media_begin kimia_media_end "
        "pad_token_id"
    ),
    "whisper-large-v3/config.json": (
        "d_model encoder_layers encoder_attention_heads encoder_ffn_dim num_mel_bins max_source_positions "
        "activation_function"
    ),
    "glm-4-voice-tokenizer/config.json": (
        "d_model encoder_layers encoder_attention_heads encoder_ffn_dim num_mel_bins max_source_positions "
        "pooling_kernel_size pooling_position quantize_position quantize_vocab_size encoder_causal_convolution"
    ),
    "glm-4-voice-tokenizer/preprocessor_config.json": "feature_size hop_length n_fft sampling_rate chunk_length",
    "audio_detokenizer/config.yaml": (
        "normalize_mel mel_mean mel_std input_size semantic_vocab_size hidden_size depth num_heads mlp_ratio ffn_type "
        "position_embedding_type max_seq_len model"
    ),
    "vocoder/config.json": (
        "resblock num_mels upsample_rates upsample_kernel_sizes upsample_initial_channel resblock_kernel_sizes "
        "resblock_dilation_sizes activation snake_logscale n_fft hop_size sampling_rate"
    ),
}
DEFAULTS = {  # field in the file, attribute of the config (if any), and its value when the file lacks the field
    "config.json": [
        ("hidden_act", None, None),
        ("tie_word_embeddings", None, None),
        ("use_whisper_feature", None, None),
    ],
    "glm-4-voice-tokenizer/config.json": [
        ("pooling_type", "pooling_type", "max"),
        ("quantize_causal_block_size", "block_size", None),
        ("quantize_causal_encoder", "causal_attention", False),
        ("encoder_causal_attention", "causal_attention", False),
    ],
    "vocoder/config.json": [("win_size", "win", 2048), ("fmin", "fmin", 0.0)],
}
CASES = [(file, field) for file, fields in REQUIRED.items() for field in fields.split()]
SWITCHES = [(file, *default) for file, defaults in DEFAULTS.items() for default in defaults]


def parsed(file):
    return json.loads(FILES[file]) if file.endswith(".json") else yaml.safe_load(FILES[file])


def section_of(values, field):
    """The mapping that holds a field: the file's own or the nested `model.dit`."""
    return values if field in values else values["model"]["dit"]


def written(tmp_path, file, values):
    path = tmp_path / file.rpartition("/")[2]
    path.write_text(json.dumps(values) if file.endswith(".json") else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("file", "field"), CASES)
def test_a_missing_field_is_named(tmp_path, file, field):
    values = parsed(file)
    del section_of(values, field)[field]
    path = written(tmp_path, file, values)
    with pytest.raises(ConfigError) as caught:
        READERS[file].read(path)
    assert str(path) in str(caught.value)
    assert repr(field) in str(caught.value)


@pytest.mark.parametrize(("file", "field", "attribute", "value"), SWITCHES)
def test_a_missing_switch_takes_upstreams_default(tmp_path, file, field, attribute, value):
    values = parsed(file) | ({"n_fft": 2048} if field == "win_size" else {})
    del values[field]
    config = READERS[file].read(written(tmp_path, file, values))
    assert attribute is None or getattr(config, attribute) == value


@pytest.mark.parametrize(("file", "field"), [*CASES, *(switch[:2] for switch in SWITCHES)])
def test_a_field_of_a_wrong_type_is_named(tmp_path, file, field):
    values = parsed(file)
    section_of(values, field)[field] = {"not": "a value"}
    path = written(tmp_path, file, values)
    with pytest.raises(ConfigError) as caught:
        READERS[file].read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "28", None])
def test_dimensions_are_positive_integers(tmp_path, value):
    path = written(tmp_path, "config.json", parsed("config.json") | {"num_hidden_layers": value})
    with pytest.raises(ConfigError, match=r"'num_hidden_layers' must be an integer of at least 1, got"):
        LMConfig.read(path)


@pytest.mark.parametrize("value", ["1e6", True, float("inf"), float("nan")])
def test_numbers_are_finite(tmp_path, value):
    path = written(tmp_path, "config.json", parsed("config.json") | {"rope_theta": value})
    with pytest.raises(ConfigError, match="'rope_theta' must be a finite number"):
        LMConfig.read(path)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"num_attention_heads": 27}),
        ("config.json", {"hidden_size": 8 * 10**15}),
        ("config.json", {"num_hidden_layers": 10**6}),
        ("config.json", {"rope_theta": 0}),
        ("config.json", {"rope_theta": -5}),
        ("config.json", {"rope_theta": 10**400}),
        ("config.json", {"rms_norm_eps": -1e-6}),
        ("config.json", {"num_key_value_heads": 5}),
        ("config.json", {"kimia_mimo_transformer_from_layer_index": 28}),
        ("config.json", {"kimia_token_offset": 168448}),
        ("config.json", {"tie_word_embeddings": True}),
        ("config.json", {"rope_scaling": {"type": "linear"}}),
        ("config.json", {"hidden_act": "gelu"}),
        ("whisper-large-v3/config.json", {"encoder_attention_heads": 7}),
        ("glm-4-voice-tokenizer/config.json", {"quantize_position": 33}),
        ("glm-4-voice-tokenizer/config.json", {"pooling_position": 17}),
        ("glm-4-voice-tokenizer/config.json", {"pooling_type": "sum"}),
        ("glm-4-voice-tokenizer/preprocessor_config.json", {"hop_length": 161}),
        ("glm-4-voice-tokenizer/preprocessor_config.json", {"n_fft": 2**40}),
        ("glm-4-voice-tokenizer/preprocessor_config.json", {"n_fft": 480002}),
        ("vocoder/config.json", {"n_fft": 2**40}),
        ("vocoder/config.json", {"win_size": 10**5}),
        ("vocoder/config.json", {"fmax": -1}),
        ("vocoder/config.json", {"resblock_kernel_sizes": [3, 4, 11]}),
        ("vocoder/config.json", {"upsample_kernel_sizes": [3, 2, 2, 2, 2, 2, 2]}),
        ("vocoder/config.json", {"resblock_dilation_sizes": [["a"]] * 3}),
        ("vocoder/config.json", {"resblock_dilation_sizes": [[0]] * 3}),
        ("vocoder/config.json", {"resblock_dilation_sizes": [[True]] * 3}),
        ("vocoder/config.json", {"resblock_dilation_sizes": [[2**40]] * 3}),
        ("vocoder/config.json", {"resblock_dilation_sizes": []}),
        ("vocoder/config.json", {"hop_size": 481}),
        ("vocoder/config.json", {"upsample_rates": [5, 2]}),
        ("vocoder/config.json", {"upsample_kernel_sizes": [8, 4, 4, 4, 4, 5, 4]}),
        ("vocoder/config.json", {"resblock_kernel_sizes": [3]}),
        ("vocoder/config.json", {"resblock_dilation_sizes": [[1, 3, 5]] * 3 + [[]]}),
        ("vocoder/config.json", {"resblock": "2"}),
        ("vocoder/config.json", {"upsample_initial_channel": 100}),
    ],
)
def test_contradictions_are_refused(tmp_path, file, change):
    path = written(tmp_path, file, parsed(file) | change)
    with pytest.raises(ConfigError, match=path.name):
        READERS[file].read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 17},
        {"num_heads": 2304},
        {"ffn_type": "conv_mlp"},
        {"mlp_ratio": -1},
        {"mlp_ratio": 1e308},
        {"mlp_ratio": 1e-5},
        {"rope_params": {"rope_interpolation_factor": 0}},
        {"rope_params": {"rope_interpolation_factor": -2.0}},
        {"rope_params": {"rope_base": 0}},
        {"rope_params": [4096]},
        {"position_embedding_type": "sincos", "hidden_size": 2, "num_heads": 1},
    ],
)
def test_contradictions_of_the_flow_model(tmp_path, change):
    values = parsed("audio_detokenizer/config.yaml")
    values["model"]["dit"] |= change
    path = written(tmp_path, "audio_detokenizer/config.yaml", values)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        FlowConfig.read(path)


@pytest.mark.parametrize("std", [0, 0.0, -1.0])
def test_mels_are_spread(tmp_path, std):
    file = "audio_detokenizer/config.yaml"
    with pytest.raises(ConfigError, match="'mel_std' must be a positive number, got"):
        FlowConfig.read(written(tmp_path, file, parsed(file) | {"mel_std": std}))


NESTED = "[" * 200_000


@pytest.mark.parametrize("text", [NESTED, '{"vocab_size": ' + NESTED, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_json_that_the_parser_gives_up(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: cannot be parsed as JSON"):
        LMConfig.read(path)


@pytest.mark.parametrize(
    "text", [NESTED, "a: 2020-13-45", "a: !!timestamp x", "a: !!bool x", "a: !!int ''", "a: !!float x"]
)
def test_yaml_that_the_parser_gives_up(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be parsed as YAML"):
        FlowConfig.read(path)


def test_a_complaint_stays_short(tmp_path):
    """Nine anchors, each nine times the one before: whole, the value would fill the memory."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*rows, "model: *a8"]))
    with pytest.raises(ConfigError, match="'model' must be a mapping") as caught:
        FlowConfig.read(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[1, 2]", "null", "3", '{"vocab_size": 1'])
def test_half_a_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        LMConfig.read(path)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\t:"])
def test_half_a_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        FlowConfig.read(path)


def test_binary_instead_of_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_fields(path)


def test_absent_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        LMConfig.read(tmp_path / "config.json")


def test_yaml_cannot_build_objects(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'pwned'}]")
    with pytest.raises(ConfigError):
        FlowConfig.read(path)
    assert not (tmp_path / "pwned").exists()


def read(tmp_path, file, change=None):
    return READERS[file].read(written(tmp_path, file, parsed(file) | (change or {})))


def test_released_language_model(tmp_path):
    config = read(tmp_path, "config.json")
    assert (config.head_dim, config.audio_codes, config.audio_delay, config.fork_layer) == (128, 16384, 6, 21)
    assert (config.token_offset, config.pad_token, config.media_begin) == (152064, 152063, 151661)


def test_released_vq_tokenizer(tmp_path):
    config = read(tmp_path, "glm-4-voice-tokenizer/config.json")
    assert (config.pooling_kernel, config.block_size, config.codebook_size) == (4, 200, 16384)
    assert not config.causal_attention


def test_vq_tokenizer_without_pooling_and_blocks(tmp_path):
    change = {"pooling_kernel_size": None, "quantize_causal_block_size": None, "quantize_causal_encoder": True}
    config = read(tmp_path, "glm-4-voice-tokenizer/config.json", change)
    assert (config.pooling_kernel, config.block_size, config.causal_attention) == (1, None, True)


def test_a_block_may_be_short_where_no_layer_follows_the_pooling(tmp_path):
    file = "glm-4-voice-tokenizer/config.json"
    with pytest.raises(ConfigError, match="quantize_causal_block_size is smaller"):
        read(tmp_path, file, {"quantize_causal_block_size": 3, "pooling_position": 15})
    assert read(tmp_path, file, {"quantize_causal_block_size": 3, "pooling_position": 16}).block_size == 3
    change = {"quantize_causal_block_size": 3, "pooling_position": 15, "encoder_causal_attention": True}
    assert read(tmp_path, file, change).causal_attention  # no blocks at all


def test_released_flow_model(tmp_path):
    config = read(tmp_path, "audio_detokenizer/config.yaml")
    assert (config.head_dim, config.mlp_hidden, config.max_positions) == (128, 9216, 4096)
    assert (config.mel_mean, config.mel_std) == (-4.479605, 3.4584913)


def test_flow_model_without_normalisation_or_rope(tmp_path):
    values = parsed("audio_detokenizer/config.yaml") | {"normalize_mel": False}
    del values["mel_mean"]
    for field in ("rope_params", "use_rope"):
        del values["model"]["dit"][field]
    config = FlowConfig.read(written(tmp_path, "audio_detokenizer/config.yaml", values))
    assert (config.mel_mean, config.mel_std, config.use_rope, config.rope_base) == (0.0, 1.0, False, 10000.0)


@pytest.mark.parametrize("params", [None, {}, {"rope_interpolation_factor": 0, "max_position_embeddings": 8}])
@pytest.mark.parametrize(("embedding", "positions"), [("skip", 2**31 - 1), ("sincos", 2**31 - 1), ("learnable", 101)])
def test_without_rope_only_a_learnable_table_bounds_positions(tmp_path, params, embedding, positions):
    values = parsed("audio_detokenizer/config.yaml")
    values["model"]["dit"] |= {
        "use_rope": False, "rope_params": params, "max_seq_len": 100, "position_embedding_type": embedding,
        "num_heads": 256,
    }  # fmt: skip
    config = FlowConfig.read(written(tmp_path, "audio_detokenizer/config.yaml", values))
    assert (config.max_positions, config.head_dim) == (positions, 9)


def test_rope_without_parameters_takes_the_defaults(tmp_path):
    values = parsed("audio_detokenizer/config.yaml")
    values["model"]["dit"] |= {"use_rope": True, "rope_params": None, "max_seq_len": 9000}
    config = FlowConfig.read(written(tmp_path, "audio_detokenizer/config.yaml", values))
    assert (config.rope_base, config.rope_scale, config.max_positions) == (10000.0, 1.0, 4096)


def test_position_table_is_cut_by_the_shorter_limit(tmp_path):
    values = parsed("audio_detokenizer/config.yaml")
    values["model"]["dit"] |= {"max_seq_len": 1000}
    values["model"]["dit"]["rope_params"]["rope_interpolation_factor"] = 4.0
    config = FlowConfig.read(written(tmp_path, "audio_detokenizer/config.yaml", values))
    assert (config.max_positions, config.rope_scale) == (1000, 0.25)


def test_vocoder_defaults_are_the_releases_code(tmp_path):
    values = parsed("vocoder/config.json")
    for field in ("use_bias_at_final", "use_tanh_at_final"):
        del values[field]
    config = VocoderConfig.read(written(tmp_path, "vocoder/config.json", values))
    assert config.bias_at_final
    assert config.tanh_at_final
    assert config.fmax is None


def test_exact_div():
    assert exact_div(12, 4, "x") == 3
    with pytest.raises(ConfigError, match="x: 13 is not a multiple of 4"):
        exact_div(13, 4, "x")
