"""Checkpoints with random weights in exactly the released layout, for tests and for benchmarks without the download.

Notes
- A tensor's values depend on the seed and on its name only, so neither order nor preset size matters, and no more
  than one tensor is ever held.
- Scales follow fan-in, so that a forward pass of any width gives finite and varied logits and sound that neither
  clips nor vanishes. The heads favour the ids of their own track, so that a random answer has text and speech.
- The `.pt` files carry what the release's carry and loaders must drop: the `speech_model.` prefix, a stray resampler
  kernel, legacy weight norm; the language model carries its bf16 rotary leftovers in irregularly named shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from kimia.errors import ParameterError
from kimia.model import layout
from kimia.model.checkpoint import SHARD_INDEX, SINGLE_FILE, VQ_TOKENIZER, Checkpoint, Source, Stored
from kimia.model.checkpoint_presets import (
    LM_DTYPE,
    PRESETS,
    WHISPER_DTYPE,
    Preset,
    special_names,
    text_files,
    vocabulary,
)
from kimia.model.consistency import ModelConfigs, read_configs
from kimia.model.layout import Layout, Shape
from kimia.model.philox import check_seed
from kimia.model.writing import Progress, stored_bytes, whole_folder, write_safetensors, write_torch

# ---- what is written: files, names, shapes ----------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedFile:
    """One weight file: its path in the checkpoint folder and the (shape, torch dtype name) of each tensor."""

    path: PurePosixPath
    tensors: dict[str, tuple[Shape, str]]
    torch_key: str | None = None  # for .pt files, the key that the tensors lie under

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(stored_bytes(shape, dtype) for shape, dtype in self.tensors.values())


def plan(preset: Preset) -> list[PlannedFile]:
    """Every weight file of a preset, without making any weight."""
    configs = preset_configs(preset)
    assert configs.flow is not None
    assert configs.vocoder is not None
    flow = layout.under(layout.FLOW_PREFIX, layout.flow(configs.flow))
    flow["resampler.kernel"] = (1, 1, layout.RESAMPLER_TAPS)
    vq = layout.vq_tokenizer(configs.vq) | layout.codebook_training_state(configs.vq)
    whisper = layout.under("model.encoder.", layout.whisper_encoder(configs.whisper))
    vocoder = layout.weight_normed(layout.vocoder(configs.vocoder))
    return [
        *_language_model_shards(configs),
        PlannedFile(PurePosixPath("whisper-large-v3", SINGLE_FILE), _typed(whisper, WHISPER_DTYPE)),
        PlannedFile(PurePosixPath(VQ_TOKENIZER, SINGLE_FILE), _typed(vq, "float32")),
        PlannedFile(PurePosixPath("audio_detokenizer/model.pt"), _typed(flow, "float32"), "state_dict"),
        PlannedFile(PurePosixPath("vocoder/model.pt"), _typed(vocoder, "float32"), "generator"),
    ]


def preset_configs(preset: Preset) -> ModelConfigs:
    """The configs of a preset, read and checked as those of any checkpoint are."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        _write_text_files(root, preset)
        return read_configs(Checkpoint(root, root / VQ_TOKENIZER))


def _typed(tensors: Layout, dtype: str) -> dict[str, tuple[Shape, str]]:
    return {name: (shape, dtype) for name, shape in tensors.items()}


def _language_model_shards(configs: ModelConfigs) -> list[PlannedFile]:
    """One shard per layer, the adaptor's, and one of another numbering for the rest: the release's irregular names."""
    config = configs.lm
    rotary: Layout = {"self_attn.rotary_emb.inv_freq": (config.head_dim // 2,)}
    shards = [
        layout.decoder_layer(config, prefix) | layout.under(prefix, rotary)
        for prefix in layout.layer_prefixes(config)
    ]  # fmt: skip
    shards.append(layout.adaptor(config))
    names = [f"model-{index}-of-{len(shards)}.safetensors" for index in range(1, len(shards) + 1)]
    last = len(shards) + 1
    return [
        PlannedFile(PurePosixPath(name), _typed(shard, LM_DTYPE))
        for name, shard in zip(
            [*names, f"model-{last}-of-{last}.safetensors"],
            [*shards, layout.embeddings_and_heads(config)],
            strict=True,
        )
    ]


# ---- how it is drawn --------------------------------------------------------------------------------------------

Draw = Callable[[Shape, torch.dtype, torch.Generator], Tensor]


def _normal(mean: float, std: float) -> Draw:
    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(mean, std, generator=generator)

    return draw


def _fan_in(gain: float) -> Draw:
    """Standard deviation gain / sqrt(inputs of one output): unit inputs give outputs of size `gain`."""

    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(0.0, gain / math.sqrt(prod(shape[1:])), generator=generator)

    return draw


def _contrast(gain: float) -> Draw:
    """As `_fan_in`, but every output's weights sum to nothing: it sees differences, not the level common to all."""

    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        weight = _fan_in(gain)(shape, torch.float32, generator)
        return (weight - weight.mean(dim=tuple(range(1, len(shape))), keepdim=True)).to(dtype)

    return draw


def _positions(shape: Shape, dtype: torch.dtype, _: torch.Generator) -> Tensor:
    """Whisper's sinusoids: sines in the first half of the width, cosines in the second."""
    length, width = shape
    rates = torch.exp(-math.log(10000.0) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates  # (positions, width / 2)
    return (0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)).to(dtype)


def _lowpass(shape: Shape, dtype: torch.dtype, _: torch.Generator) -> Tensor:
    """BigVGAN's filter around its activations: a Kaiser-windowed sinc that passes the lower half of the band."""
    taps, cutoff, half_width = shape[-1], 0.25, 0.3
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95  # dB
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula above 50 dB
    window = torch.kaiser_window(taps, periodic=False, beta=beta)
    response = window * torch.sinc(2 * cutoff * (torch.arange(taps) - (taps - 1) / 2))
    return (response / response.sum()).reshape(shape).to(dtype)


def _inverse_frequencies(theta: float) -> Draw:
    def draw(shape: Shape, dtype: torch.dtype, _: torch.Generator) -> Tensor:
        return (theta ** (-torch.arange(shape[0]) / shape[0])).to(dtype)

    return draw


def _head(gain: float, row_gains: Tensor) -> Draw:
    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return _fan_in(gain)(shape, dtype, generator).mul_(row_gains[:, None].to(dtype))

    return draw


OTHER_TRACK_GAIN = 0.2  # of a head's rows for ids that the track should not say
END_GAIN = 1.6  # of the rows that end a track: random answers last some ten steps


def _text_gains(preset: Preset, vocab_size: int) -> Tensor:
    gains = torch.full((vocab_size,), OTHER_TRACK_GAIN)
    readable = [token.isascii() and token.decode("ascii").isprintable() for token in vocabulary(preset)]
    gains[: len(readable)][torch.tensor(readable)] = 1.0
    gains[special_names(preset)["<|im_kimia_text_eos|>"]] = END_GAIN
    return gains


def _audio_gains(preset: Preset, vocab_size: int) -> Tensor:
    gains = torch.full((vocab_size,), OTHER_TRACK_GAIN)
    gains[-preset.audio_codes :] = 1.0
    gains[special_names(preset)["<|im_msg_end|>"]] = END_GAIN
    return gains


Rules = list[tuple[str, Draw]]  # a regular expression that finds the name; the first match counts


def _language_model_rules(preset: Preset, configs: ModelConfigs) -> Rules:
    size = configs.lm.vocab_size
    return [
        (r"inv_freq$", _inverse_frequencies(configs.lm.rope_theta)),
        (r"lm_head", _head(6.0, _text_gains(preset, size))),
        (r"mimo_output", _head(6.0, _audio_gains(preset, size))),
        (r"embed_tokens", _normal(0.0, 0.4)),
        (r"vq_adaptor\.layers\.4\.weight", _normal(0.5, 0.1)),
        (r"norm\.weight$", _normal(1.0, 0.15)),
        (r"_proj\.bias$", _normal(0.0, 0.3)),
        (r"\.bias$", _normal(0.0, 0.1)),
        (r"[qk]_proj\.weight$", _fan_in(2.2)),
        (r"o_proj\.weight$|down_proj\.weight$", _fan_in(1.25)),
        (r"weight$", _fan_in(1.0)),
    ]


ENCODER_RULES: Rules = [
    (r"embed_positions\.weight$", _positions),
    (r"embed_positions2\.weight$", _normal(0.0, 0.5)),
    (r"codebook\.weight$", _contrast(10.0)),
    (r"ema_count$", _normal(25.0, 5.0)),
    (r"ema_weight$", _normal(25.0, 50.0)),
    (r"layer_norm\.weight$", _normal(1.0, 0.1)),
    (r"bias$", _normal(0.0, 0.1)),
    (r"conv\d\.weight$", _contrast(6.0)),
    (r"[qk]_proj\.weight$", _fan_in(2.0)),
    (r"out_proj\.weight$", _fan_in(0.5)),
    (r"weight$", _fan_in(1.0)),
]

FLOW_RULES: Rules = [
    (r"resampler", _normal(0.0, 0.1)),
    (r"embedding\.", _normal(0.0, 0.7)),
    (r"bias$", _normal(0.0, 0.05)),
    (r"attn\.qkv\.weight$", _fan_in(1.6)),
    (r"weight$", _fan_in(1.0)),
]

VOCODER_RULES: Rules = [
    (r"filter$", _lowpass),
    (r"act\.(alpha|beta)$", _normal(0.25, 0.3)),  # logarithms
    (r"weight_v$", _normal(0.0, 1.0)),
    (r"bias$", _normal(0.0, 0.02)),
    (r"conv_pre\.weight_g$", _normal(0.35, 0.07)),
    (r"conv_post\.weight_g$", _normal(0.06, 0.0)),
    (r"convs2\.\d+\.weight_g$", _normal(0.5, 0.1)),
    (r"weight_g$", _normal(0.95, 0.2)),
]


def _drawn(seed: int, rules: Rules, tensors: dict[str, tuple[Shape, str]]) -> Source:
    return {
        name: Stored(shape, dtype, partial(_draw, seed, rules, name, shape, dtype))
        for name, (shape, dtype) in tensors.items()
    }


def _draw(seed: int, rules: Rules, name: str, shape: Shape, dtype: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rule = next(rule for pattern, rule in rules if re.search(pattern, name))
    return rule(shape, getattr(torch, dtype), generator)


# ---- writing ----------------------------------------------------------------------------------------------------


def new_checkpoint(folder: str | Path, preset: str, seed: int = 0, *, progress: bool | None = None) -> Path:
    """Write a checkpoint with random weights into a new folder, whole or not at all, and return the folder.

    `progress` shows a bar on stderr; None shows it on a terminal only. Raises ParameterError for an unknown preset or
    an illegal seed, CheckpointError when the folder is not empty or cannot be created.
    """
    if preset not in PRESETS:
        raise ParameterError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    check_seed(seed)
    folder = Path(folder)
    files = plan(PRESETS[preset])
    with (
        whole_folder(folder) as root,
        tqdm(
            total=sum(file.bytes for file in files),
            unit="B",
            unit_scale=True,
            desc=f"random weights ({preset})",
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        _write_text_files(root, PRESETS[preset])
        _write_index(root, files)
        for file, rules in _with_rules(PRESETS[preset], files):
            _write_weights(root, file, _drawn(seed, rules, file.tensors), bar.update)
    return folder


def _write_text_files(root: Path, preset: Preset) -> None:
    for path, text in text_files(preset).items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def _with_rules(preset: Preset, files: list[PlannedFile]) -> Iterator[tuple[PlannedFile, Rules]]:
    by_folder = {
        "": _language_model_rules(preset, preset_configs(preset)),
        "whisper-large-v3": ENCODER_RULES,
        VQ_TOKENIZER: ENCODER_RULES,
        "audio_detokenizer": FLOW_RULES,
        "vocoder": VOCODER_RULES,
    }
    for file in files:
        yield file, by_folder[file.path.parent.name]


def _write_weights(root: Path, file: PlannedFile, source: Source, progress: Progress) -> None:
    path = root / file.path
    if file.torch_key is not None:
        write_torch(path, file.torch_key, source, progress)
    elif path.parent.name == "whisper-large-v3":
        write_safetensors(path, source, None, progress)  # the release's file has no metadata, which trips some readers
    else:
        write_safetensors(path, source, {"format": "pt"}, progress)


def _write_index(root: Path, files: list[PlannedFile]) -> None:
    shards = [file for file in files if file.path.parent == PurePosixPath()]
    weight_map = {name: file.path.name for file in shards for name in file.tensors}
    index = {"metadata": {"total_size": sum(file.bytes for file in shards)}, "weight_map": weight_map}
    (root / SHARD_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
