"""Config and vocabulary files of the checkpoints that `kimia checkpoint new` writes.

`7b` has the released dimensions field by field; `tiny` is the same model shrunk until a laptop answers at once. What
ties the parts together (vocabulary, codebook, feature width) is derived, so a preset cannot contradict itself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import PurePosixPath
from typing import Any

import yaml

from kimia.model.checkpoint import VQ_TOKENIZER
from kimia.model.text import RELEASE_ORDER

SPECIAL_TOKENS = 421  # of the release, named and reserved
FEATURE_GROUP = 4  # encoder frames per continuous feature, and per semantic token
LM_DTYPE = "bfloat16"
WHISPER_DTYPE = "float16"


@dataclass(frozen=True)
class Preset:
    """The dimensions in which checkpoints of one layout differ. Field names are the config files' own."""

    base_tokens: int  # lines of tiktoken.model
    audio_codes: int
    lm: dict[str, int]
    whisper: dict[str, int]
    vq: dict[str, int]
    flow: dict[str, int]
    vocoder: dict[str, Any]


PRESETS = {
    "tiny": Preset(
        base_tokens=462,  # bytes, letters and open syllables: what a random model says can be read aloud
        audio_codes=512,
        lm={
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "kimia_mimo_layers": 2,
            "kimia_mimo_transformer_from_layer_index": 3,
            "num_audio_special_tokens": 32,
        },
        whisper={"d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 192},
        vq={
            "d_model": 64,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "pooling_position": 2,
            "quantize_position": 2,
        },
        flow={"hidden_size": 96, "depth": 3, "num_heads": 3},
        vocoder={
            "upsample_initial_channel": 256,
            "resblock_kernel_sizes": [3, 7],
            "resblock_dilation_sizes": [[1, 3, 5]] * 2,
        },
    ),
    "7b": Preset(
        base_tokens=151643,
        audio_codes=16384,
        lm={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "kimia_mimo_layers": 6,
            "kimia_mimo_transformer_from_layer_index": 21,
            "num_audio_special_tokens": 512,
        },
        whisper={"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
        vq={
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "pooling_position": 16,
            "quantize_position": 16,
        },
        flow={"hidden_size": 2304, "depth": 16, "num_heads": 18},
        vocoder={
            "upsample_initial_channel": 2048,
            "resblock_kernel_sizes": [3, 5, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5]] * 4,
        },
    ),
}


def text_files(preset: Preset) -> dict[PurePosixPath, str]:
    """Every file of the checkpoint that is not weights: path in the checkpoint folder -> content."""
    whisper, vq = PurePosixPath("whisper-large-v3"), PurePosixPath(VQ_TOKENIZER)
    names = special_names(preset)
    flow = yaml.safe_dump(_flow_config(preset), sort_keys=False)
    return {
        PurePosixPath("config.json"): _json(_lm_config(preset)),
        PurePosixPath("generation_config.json"): _json(_generation_config(preset)),
        PurePosixPath("tokenizer_config.json"): _json(_tokenizer_config(names)),
        PurePosixPath("special_tokens_map.json"): _json(_named_tokens(names)),
        PurePosixPath("tiktoken.model"): _tiktoken_lines(preset),
        whisper / "config.json": _json(_encoder_config(preset, WHISPER_DTYPE) | preset.whisper),
        whisper / "preprocessor_config.json": _json(PREPROCESSOR),
        vq / "config.json": _json(_encoder_config(preset, "float32") | _quantizer_config(preset) | preset.vq),
        vq / "preprocessor_config.json": _json(PREPROCESSOR),
        PurePosixPath("audio_detokenizer/config.yaml"): flow,
        PurePosixPath("vocoder/config.json"): _json(VOCODER | preset.vocoder),
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


# ---- config files -----------------------------------------------------------------------------------------------


def _special_id(preset: Preset, name: str) -> int:
    return special_names(preset)[name]


def _lm_config(preset: Preset) -> dict[str, Any]:
    offset = preset.base_tokens + SPECIAL_TOKENS
    return {
        "architectures": ["MoonshotKimiaForCausalLM"],
        "bos_token_id": _special_id(preset, "[BOS]"),
        "eos_token_ids": [_special_id(preset, "[EOS]"), _special_id(preset, "<|im_msg_end|>")],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "kimia_adaptor_input_dim": FEATURE_GROUP * preset.whisper["d_model"],
        "kimia_audio_output_vocab": preset.audio_codes + preset.lm["num_audio_special_tokens"],
        "kimia_media_begin": _special_id(preset, "<|im_media_begin|>"),
        "kimia_media_end": _special_id(preset, "<|im_media_end|>"),
        "kimia_mimo_audiodelaytokens": 6,
        "kimia_text_output_vocab": offset,
        "kimia_token_offset": offset,
        "max_position_embeddings": 8192,
        "num_base_tokens": preset.base_tokens,
        "pad_token_id": offset - 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": LM_DTYPE,
        "kimia_random_weights": True,  # the one field that the release does not have
        "transformers_version": "4.44.1",
        "use_cache": True,
        "use_whisper_feature": True,
        "vocab_size": offset + preset.audio_codes,
    } | preset.lm


def _generation_config(preset: Preset) -> dict[str, Any]:
    config = _lm_config(preset)
    return {
        "_from_model_config": True,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_ids"],
        "transformers_version": "4.44.1",
    }


PREPROCESSOR = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "WhisperProcessor",
    "return_attention_mask": False,
    "sampling_rate": 16000,
}


def _encoder_config(preset: Preset, dtype: str) -> dict[str, Any]:
    width = preset.whisper["d_model"]
    return {
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "architectures": ["WhisperForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 50257,
        "d_model": width,
        "decoder_attention_heads": preset.whisper["encoder_attention_heads"],
        "decoder_ffn_dim": preset.whisper["encoder_ffn_dim"],
        "decoder_layerdrop": 0.0,
        "decoder_layers": preset.whisper["encoder_layers"],
        "decoder_start_token_id": 50258,
        "dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "eos_token_id": 50257,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "model_type": "whisper",
        "num_hidden_layers": preset.whisper["encoder_layers"],
        "num_mel_bins": PREPROCESSOR["feature_size"],
        "pad_token_id": 50256,
        "scale_embedding": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": 51866,
    }


def _quantizer_config(preset: Preset) -> dict[str, Any]:
    return {
        "architectures": ["WhisperVQEncoder"],
        "encoder_causal_attention": False,
        "encoder_causal_convolution": True,
        "pooling_kernel_size": FEATURE_GROUP,
        "pooling_type": "avg",
        "quantize_causal_block_size": 200,
        "quantize_causal_encoder": False,
        "quantize_commit_coefficient": 0.25,
        "quantize_ema_decay": 0.99,
        "quantize_encoder_only": True,
        "quantize_loss_scale": 10.0,
        "quantize_restart_interval": 100,
        "quantize_vocab_size": preset.audio_codes,
        "skip_language_detection": True,
        "transformers_version": "4.44.1",
    }


def _flow_config(preset: Preset) -> dict[str, Any]:
    return {
        "normalize_mel": True,
        "mel_mean": -4.479605,
        "mel_std": 3.4584913,
        "model": {
            "dit": {
                "use_rope": True,
                "rope_params": {
                    "max_position_embeddings": 4096,
                    "rope_base": 10000.0,
                    "rope_interpolation_factor": 1.0,
                },
                "position_embedding_type": "skip",
                "max_seq_len": 4096,
                "mlp_ratio": 4.0,
                "ffn_type": "vanilla_mlp",
                "input_size": VOCODER["num_mels"],
                "semantic_vocab_size": preset.audio_codes,
            }
            | preset.flow
        },
    }


VOCODER: dict[str, Any] = {
    "resblock": "1",
    "upsample_rates": [5, 2, 2, 2, 2, 3, 2],
    "upsample_kernel_sizes": [9, 4, 4, 4, 4, 5, 4],
    "activation": "snakebeta",
    "snake_logscale": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "num_mels": 80,
    "n_fft": 1024,
    "hop_size": 480,
    "win_size": 1024,
    "sampling_rate": 24000,
    "fmin": 0,
    "fmax": None,
}


# ---- vocabulary -------------------------------------------------------------------------------------------------


def special_names(preset: Preset) -> dict[str, int]:
    """Name -> id of all special tokens, in the release's order: reserved ones are counted where none is named."""
    names: dict[str, int] = {}
    for index in range(SPECIAL_TOKENS):
        reserved = index - sum(named < index for named in RELEASE_ORDER)
        names[RELEASE_ORDER.get(index, f"<|reserved_token_{reserved}|>")] = preset.base_tokens + index
    return names


def _named_tokens(names: dict[str, int]) -> dict[str, Any]:
    extra = [name for name in RELEASE_ORDER.values() if name not in ("[BOS]", "[EOS]")]
    return {"additional_special_tokens": extra, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": [*names][-1]}


def _tokenizer_config(names: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(token): {"content": name} | flags for name, token in names.items()},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "TikTokenTokenizer",
    } | _named_tokens(names)


def vocabulary(preset: Preset) -> list[bytes]:
    """The base tokens by id: 256 bytes, then made-up merges, so that any text can be encoded without training."""
    return list(islice(dict.fromkeys(chain(_single_bytes(), _merges())), preset.base_tokens))


def _single_bytes() -> Iterator[bytes]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's order: "!" is id 0
    return (bytes([value]) for value in [*printable, *(value for value in range(256) if value not in printable)])


def _merges() -> Iterator[bytes]:
    """Two-byte merges before three-byte ones and so on, each reachable by merging an earlier one with a byte."""
    letters, consonants, vowels = b"abcdefghijklmnopqrstuvwxyz", b"bcdfghjklmnprstvwz", b"aeiou"
    syllables = [bytes(pair) for pair in product(consonants, vowels)]
    yield from (b" " + bytes([letter]) for letter in letters)
    yield from syllables
    yield from (b" " + syllable for syllable in syllables)
    for length in (2, 3, 4):
        yield from (bytes(run) for run in product(letters, repeat=length))


def _tiktoken_lines(preset: Preset) -> str:
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(vocabulary(preset)))
    return "\n".join(lines) + "\n"
