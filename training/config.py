"""The micro checkpoint's dimensions, and its config files in the released layout.

Everything that the release fixes stays (12.5 Hz tokens, 50 Hz frames, 24 kHz, delay 6, special ids, file names);
only widths, depths and the segment shrink, until the whole folder is below 40 MB. A sentence of the domain fits into
8 s, so the encoders' segment is 8 s instead of 30 s: that is what they pad to, and what a short question costs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kimia.model import layout
from kimia.model.checkpoint import VQ_TOKENIZER, Checkpoint
from kimia.model.checkpoint_presets import Preset, text_files
from kimia.model.config import FlowConfig, VocoderConfig
from kimia.model.consistency import ModelConfigs, read_configs
from kimia.model.writing import whole_file
from training.vocabulary import domain_tokens, tiktoken_lines

SEGMENT_SECONDS = 8
MEL_BINS = 80  # of the encoders: the teacher's
FRAMES = 50 * SEGMENT_SECONDS  # encoder frames of a segment
CODES = 512
BLOCK_FRAMES = 200  # 4 s, as in the release
LIMIT_BYTES = 40_000_000  # of the whole folder

ENCODER = {
    "d_model": 192,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "num_mel_bins": MEL_BINS,
    "max_source_positions": FRAMES,
}

MICRO = Preset(
    base_tokens=768,
    audio_codes=CODES,
    lm={
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "kimia_mimo_layers": 2,
        "kimia_mimo_transformer_from_layer_index": 3,
        "num_audio_special_tokens": 32,
    },
    whisper=ENCODER,
    vq=ENCODER  # the same widths: it begins with the continuous encoder's weights
    | {"pooling_position": 4, "quantize_position": 4, "quantize_causal_block_size": BLOCK_FRAMES},
    flow={"hidden_size": 192, "depth": 4, "num_heads": 3},
    vocoder={
        "upsample_rates": [5, 4, 4, 3, 2],
        "upsample_kernel_sizes": [9, 8, 8, 5, 4],
        "upsample_initial_channel": 192,
        "resblock_kernel_sizes": [7],
        "resblock_dilation_sizes": [[1, 3, 5]],
    },
)

PREPROCESSOR = {
    "chunk_length": SEGMENT_SECONDS,
    "feature_size": MEL_BINS,
    "n_samples": 16000 * SEGMENT_SECONDS,
    "nb_max_frames": 2 * FRAMES,
}
TRAINED = {"kimia_random_weights": False}
STORED_BYTES = {"lm": 2, "whisper": 2, "vq": 2, "flow": 4, "vocoder": 4}  # bfloat16, float16 twice, float32 twice


def config_files() -> dict[PurePosixPath, str]:
    """Every file of the micro checkpoint but weights and vocabulary: path in the folder -> content."""
    files = text_files(MICRO)
    changes: dict[str, dict[str, Any]] = {
        "config.json": TRAINED,
        "whisper-large-v3/preprocessor_config.json": PREPROCESSOR,
        f"{VQ_TOKENIZER}/preprocessor_config.json": PREPROCESSOR,
    }
    for path, change in changes.items():
        values = json.loads(files[PurePosixPath(path)]) | change
        files[PurePosixPath(path)] = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    return files


def write_configs(root: Path) -> Checkpoint:
    """Write the config files and the vocabulary into a folder and open it as a checkpoint (without weights)."""
    vocabulary = {PurePosixPath("tiktoken.model"): tiktoken_lines(domain_tokens(MICRO.base_tokens))}
    return _write(root, config_files() | vocabulary)


def _write(root: Path, files: dict[PurePosixPath, str]) -> Checkpoint:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(root / path) as partial:  # another stage may be reading it
            partial.write_text(text, encoding="utf-8")
    return Checkpoint(root, root / VQ_TOKENIZER)


@dataclass(frozen=True)
class MicroConfigs(ModelConfigs):
    """A micro checkpoint speaks: the detokenizer's configs are always there."""

    flow: FlowConfig
    vocoder: VocoderConfig


def micro_configs() -> MicroConfigs:
    """The configs, read and cross-checked as those of any checkpoint are."""
    with TemporaryDirectory() as folder:
        configs = read_configs(_write(Path(folder), config_files()))
    return MicroConfigs(**{each.name: getattr(configs, each.name) for each in fields(configs)})


def trainer_configs() -> MicroConfigs:
    """The configs for a trainer: its draws are the same in every run, and it takes one thread of a shared machine."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    return micro_configs()


def weight_bytes(configs: MicroConfigs) -> dict[str, int]:
    """Bytes of each part's weights as stored."""
    layouts = {
        "lm": layout.language_model(configs.lm),
        "whisper": layout.whisper_encoder(configs.whisper),
        "vq": layout.vq_tokenizer(configs.vq) | layout.codebook_training_state(configs.vq),
        "flow": layout.flow(configs.flow),
        "vocoder": layout.weight_normed(layout.vocoder(configs.vocoder)),
    }
    return {part: STORED_BYTES[part] * sum(map(prod, shapes.values())) for part, shapes in layouts.items()}
