"""Golden sets of the audio input: waveforms, mel spectrograms, layer states, semantic tokens, continuous features.

`cases.json` says how each case's audio is made and which VQ tokenizer encodes it; `goldens/<case>.json` and `.npz`
hold what the reference found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimia.model.audio import LogMel, segments
from kimia.model.checkpoint import VQ_TOKENIZER
from kimia.model.config import EncoderConfig, FeatureConfig, exact_div
from kimia.model.vq import VQTokenizer, load_vq, pool
from kimia.model.whisper import WhisperFeatures, load_whisper
from kimia.verify.files import join_pieces, listed, read_arrays, read_json, read_sound, wave_facts
from kimia.verify.report import Case, Comparison

STAGE = "tokenizer"
TOLERANCE = 5e-5
WHISPER = "whisper-large-v3"

MEL = re.compile(r"(vq|wh)_mel_s(\d+)_(\d+)_(\d+)")  # encoder, segment, first frame, end
FRAME_MEAN = re.compile(r"(vq|wh)_mel_framemean_s(\d+)")
STATE = re.compile(r"vq_((?:in|out)\d+)_s(\d+)")


def listings(folder: Path, device: torch.device) -> Iterator[Iterator[Case]]:
    """The recordings of a set, then its batches; models are loaded when the first case needs them."""
    golden = _Set(folder, device)
    yield listed(STAGE, "cases", golden.spec["cases"], partial(_compare_case, golden))
    yield listed(STAGE, "cases", golden.spec.get("batches") or [], partial(_compare_batch, golden))


class _Set:
    """The files of a set, and the encoders that its cases name."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.spec: Mapping[str, Any] = read_json(folder / "cases.json")
        self.vq = lru_cache(self._load_vq)
        self.whisper = lru_cache(self._load_whisper)

    def _load_vq(self, name: str) -> VQTokenizer:
        return load_vq(self.folder / name, self.device)

    def _load_whisper(self, width: int) -> WhisperFeatures:
        """The encoder whose features are `width` wide."""
        folder = self.folder / WHISPER
        frames = exact_div(width, EncoderConfig.read(folder / "config.json").d_model, f"{folder}: feature width")
        return load_whisper(folder, frames, self.device, torch.float32)

    @cached_property
    def whisper_features(self) -> FeatureConfig:
        return FeatureConfig.read(self.folder / WHISPER / "preprocessor_config.json")

    def entry(self, name: str) -> Mapping[str, Any]:
        return next(entry for entry in self.spec["cases"] if entry.get("name") == name)

    def vq_of(self, entry: Mapping[str, Any]) -> VQTokenizer:
        return self.vq(entry.get("tokenizer") or self.spec.get("tokenizer") or VQ_TOKENIZER)

    def wave(self, entry: Mapping[str, Any], rate: int) -> np.ndarray:
        """The case's waveform (S,); pieces are cut from files that already have the model's rate."""
        audio = entry["audio"]
        if "file" in audio:
            return read_sound(self.folder / audio["file"], rate)
        return join_pieces(self.folder, audio["pieces"])

    def json(self, name: str) -> Any:
        return read_json(self.folder / "goldens" / f"{name}.json")


# ---- one recording ----------------------------------------------------------------------------------------------


def _compare_case(golden: _Set, entry: Mapping[str, Any], comparison: Comparison) -> None:
    expected = golden.json(entry["name"])
    arrays = read_arrays(golden.folder / "goldens" / f"{entry['name']}.npz")
    vq = golden.vq_of(entry)
    wave = golden.wave(entry, vq.features.sample_rate)
    _compare_lengths(comparison, vq, wave, expected)
    if "wav16k" in arrays:
        comparison.close("wav16k", wave, arrays["wav16k"], 0.0)
    _compare_tokens(comparison, vq, wave, expected, arrays)
    _compare_states(comparison, vq, wave, arrays)
    _compare_whisper(comparison, golden, entry, arrays)


def _compare_lengths(comparison: Comparison, vq: VQTokenizer, wave: np.ndarray, expected: Mapping[str, Any]) -> None:
    pieces = [len(piece) for piece in segments(wave, vq.features.segment_samples)]
    tokens = [-(-length // vq.samples_per_token) for length in pieces]
    actual = {
        "segment_samples": pieces,
        "segment_tokens": tokens,
        "n_tokens": sum(tokens),
    }
    comparison.same_fields(wave_facts(wave) | actual, expected)


def _compare_tokens(
    comparison: Comparison,
    vq: VQTokenizer,
    wave: np.ndarray,
    expected: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    hidden = vq.hidden([wave])[0]
    if "prequant" in arrays:
        comparison.close("prequant", hidden, arrays["prequant"], TOLERANCE)
    ids = vq.quantize(hidden).tolist()
    stored = expected.get("token_ids")
    if stored is not None:
        open_places = expected.get("near_tie_positions") or ()  # two codes lie equally near: either is right
        wanted = [own if place in open_places else other for place, (own, other) in _paired(ids, stored)]
        comparison.same("token_ids", ids, wanted)
    for samples, prefix_ids in (expected.get("prefix_token_ids") or {}).items():
        comparison.same(f"ids of the first {samples} samples", vq.encode([wave[: int(samples)]])[0], prefix_ids)


def _paired(own: list[int], stored: list[int]) -> Iterator[tuple[int, tuple[int | None, int]]]:
    """Places of the stored ids with both ids; None where the own list is too short."""
    for place, wanted in enumerate(stored):
        yield place, (own[place] if place < len(own) else None, wanted)


def _compare_states(
    comparison: Comparison, vq: VQTokenizer, wave: np.ndarray, arrays: Mapping[str, np.ndarray]
) -> None:
    """Mel spectrograms and layer states, padding included."""
    traced = list(vq.trace(wave))
    for key, wanted in arrays.items():
        if match := STATE.fullmatch(key):
            comparison.close(key, _state(vq, traced[int(match[2])], match[1]), wanted, TOLERANCE)
    _compare_mels(comparison, "vq", [states["mel"] for states in traced], arrays)


def _state(vq: VQTokenizer, states: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A state by name; the input of a later layer is the output of the one before, pooled where pooling stands."""
    if name in states:
        return states[name]
    layer = int(name.removeprefix("in"))
    before = states[f"out{layer - 1}"]
    if layer != vq.config.pooling_position:
        return before
    return pool(before[None], vq.config.pooling_kernel, vq.config.pooling_type)[0]


def _compare_mels(
    comparison: Comparison, encoder: str, mels: list[torch.Tensor], arrays: Mapping[str, np.ndarray]
) -> None:
    """Slices and frame means of an encoder's spectrograms (M, T), one per segment."""
    for key, wanted in arrays.items():
        if (match := MEL.fullmatch(key)) and match[1] == encoder:
            comparison.close(key, mels[int(match[2])][:, int(match[3]) : int(match[4])], wanted, TOLERANCE)
        elif (match := FRAME_MEAN.fullmatch(key)) and match[1] == encoder:
            comparison.close(key, mels[int(match[2])].mean(0), wanted, TOLERANCE)


def _compare_whisper(
    comparison: Comparison, golden: _Set, entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Whisper's spectrograms and features, where the case has any."""
    if not any(key == "features" or key.startswith("wh_mel_") for key in arrays):
        return
    config = golden.whisper_features
    wave = golden.wave(entry, config.sample_rate)
    log_mel, samples = LogMel(config), config.segment_samples
    mels = [torch.from_numpy(log_mel(piece, samples)) for piece in segments(wave, samples)]
    _compare_mels(comparison, "wh", mels, arrays)
    if "features" in arrays:
        wanted = arrays["features"]
        comparison.close("features", golden.whisper(wanted.shape[1]).encode([wave])[0], wanted, TOLERANCE)


# ---- several in one call ----------------------------------------------------------------------------------------


def _compare_batch(golden: _Set, entry: Mapping[str, Any], comparison: Comparison) -> None:
    """Ids of several recordings encoded in one call. Company changes nothing here, so where the reference's ids
    depend on the batch (`differs_from_solo_at`), those of the recording alone count.
    """
    expected = golden.json(f"batch_{entry['name']}")
    members = [golden.entry(name) for name in entry["members"]]
    vq = golden.vq_of({"tokenizer": entry.get("tokenizer") or members[0].get("tokenizer")})
    together = vq.encode([golden.wave(member, vq.features.sample_rate) for member in members])
    differing = expected.get("differs_from_solo_at") or [[]] * len(members)
    for member, ids, wanted, places in zip(members, together, expected["token_ids"], differing, strict=True):
        solo = golden.json(member["name"])["token_ids"] if places else wanted
        corrected = [solo[place] if place in places else stored for place, stored in enumerate(wanted)]
        comparison.same(f"token_ids of {member['name']}", ids, corrected)
