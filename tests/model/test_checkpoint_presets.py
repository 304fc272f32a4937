"""Config and vocabulary files of random checkpoints: the release's, field by field."""

import json

import pytest
import yaml

from kimia.model.checkpoint_presets import PRESETS, Preset, special_names, text_files, vocabulary
from kimia.model.config import LMConfig
from kimia.model.text import TextTokenizer
from tests.golden_data import golden_json

pytestmark = pytest.mark.unit


def files(preset):
    return {str(path): text for path, text in text_files(PRESETS[preset]).items()}


RELEASED = {
    "architectures": ["MoonshotKimiaForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "kimia_mimo_layers": 6,
    "kimia_mimo_transformer_from_layer_index": 21,
    "kimia_mimo_audiodelaytokens": 6,
    "kimia_token_offset": 152064,
    "kimia_text_output_vocab": 152064,
    "kimia_audio_output_vocab": 16896,
    "num_audio_special_tokens": 512,
    "num_base_tokens": 151643,
    "use_whisper_feature": True,
    "kimia_adaptor_input_dim": 5120,
    "kimia_media_begin": 151661,
    "kimia_media_end": 151663,
    "vocab_size": 168448,
    "bos_token_id": 151643,
    "eos_token_ids": [151644, 151645],
    "pad_token_id": 152063,
    "transformers_version": "4.44.1",
}


def test_released_language_model_config():
    config = json.loads(files("7b")["config.json"])
    assert config.pop("kimia_random_weights", True) is True
    assert config == RELEASED  # as in the release: no model_type


def test_released_encoder_and_detokenizer_configs():
    texts = files("7b")
    vq = json.loads(texts["glm-4-voice-tokenizer/config.json"])
    assert (vq["d_model"], vq["quantize_position"], vq["quantize_vocab_size"]) == (1280, 16, 16384)
    assert (vq["pooling_type"], vq["quantize_causal_block_size"], vq["encoder_layers"]) == ("avg", 200, 32)
    flow = yaml.safe_load(texts["audio_detokenizer/config.yaml"])["model"]["dit"]
    assert (flow["hidden_size"], flow["depth"], flow["num_heads"], flow["semantic_vocab_size"]) == (2304, 16, 18, 16384)
    vocoder = json.loads(texts["vocoder/config.json"])
    assert (vocoder["upsample_initial_channel"], vocoder["resblock_kernel_sizes"]) == (2048, [3, 5, 7, 11])


@pytest.mark.parametrize("name", PRESETS)
def test_special_tokens_have_the_releases_names_and_indices(name):
    preset = PRESETS[name]
    names = special_names(preset)
    assert len(names) == 421
    assert [*names.values()] == list(range(preset.base_tokens, preset.base_tokens + 421))
    indices = {name: token - preset.base_tokens for name, token in names.items()}
    assert indices["<|reserved_token_0|>"] == 5
    assert indices["<|reserved_token_19|>"] == 31
    assert indices["<|reserved_token_20|>"] == 34
    assert indices["<|reserved_token_406|>"] == 420
    assert indices["<|im_kimia_speech_ctd_id|>"] == 33


def test_special_tokens_equal_the_golden_checkpoints():
    listed = golden_json("e2e", "model/tokenizer_config.json")
    config = golden_json("e2e", "model/config.json")
    expected = {entry["content"]: int(token) for token, entry in listed["added_tokens_decoder"].items()}
    assert special_names(Preset(config["num_base_tokens"], 0, {}, {}, {}, {}, {})) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_vocabulary_is_complete_and_without_doubles(name):
    tokens = vocabulary(PRESETS[name])
    assert len(tokens) == len(set(tokens)) == PRESETS[name].base_tokens
    assert {bytes([value]) for value in range(256)} == set(tokens[:256])
    assert tokens[0] == b"!"


def test_released_vocabulary_size():
    assert len(files("7b")["tiktoken.model"].splitlines()) == 151643


def test_any_text_can_be_encoded(tiny):
    tokenizer = TextTokenizer.load(tiny, LMConfig.read(tiny / "config.json"))
    for text in ("hello, banana!", "你好 Kimi", "\x00é\n\t😀", "<|im_msg_end|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.base
    assert len(tokenizer.encode("banana")) < len("banana")  # merges are used
