"""Golden end-to-end conversations: sound files in; prompt, ids, text, chunk plan and waveform out.

`cases.json` holds the settings of the run, what the encoder made of each sound file, and the conversations;
`<case>.safetensors` the starting noise of each chunk and the waveform.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimia.errors import AudioError, GoldenSetError
from kimia.model.checkpoint import VQ_TOKENIZER, Checkpoint
from kimia.model.chunking import Push, pushes
from kimia.model.config import LMConfig
from kimia.model.conversation import Message, parse_conversation
from kimia.model.crossfade import ReleaseSeam
from kimia.model.detokenize import UPSAMPLE, Detokenizer
from kimia.model.encode import AudioEncoder
from kimia.model.generate import GenerateOptions
from kimia.model.lm import load_lm
from kimia.model.presets import UPSTREAM, Preset
from kimia.model.prompt import Prompt, build_prompt
from kimia.model.sampler import Sampling
from kimia.model.text import TextTokenizer
from kimia.pipeline import encode_clips, load_clips, prompt_row, track_tokens
from kimia.verify.answers import Speaker, budget, compare_answer, injected
from kimia.verify.files import compare_wave, listed, read_json, read_sound, read_tensors, wave_facts
from kimia.verify.report import Case, Comparison

STAGE = "e2e"
WAVE_TOLERANCE = 1e-4


def listings(folder: Path, device: torch.device) -> Iterator[Iterator[Case]]:
    """The sound files of a set, then its conversations; models are loaded when the first case needs them."""
    golden = _Set(folder, device)
    yield _audio_cases(golden)
    yield listed(STAGE, "cases", golden.spec["cases"], partial(_compare_case, golden))


class _Set:
    """The files of a set, and the models of its checkpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.spec: Mapping[str, Any] = read_json(folder / "cases.json")
        self.settings: Mapping[str, Any] = self.spec.get("settings") or {}
        self.checkpoint = Checkpoint(
            root=folder / (self.spec.get("model") or "model"),
            vq_tokenizer=folder / (self.spec.get("vq_tokenizer") or VQ_TOKENIZER),
        )

    @cached_property
    def config(self) -> LMConfig:
        return LMConfig.read(self.checkpoint.root / "config.json")

    @cached_property
    def encoder(self) -> AudioEncoder:
        return AudioEncoder.load(self.checkpoint, self.config.adaptor_input_dim, self.device, torch.float32)

    @cached_property
    def speaker(self) -> Speaker:
        tokenizer = TextTokenizer.load(self.checkpoint.root, self.config)
        lm = load_lm(self.checkpoint.root, device=self.device, dtype=torch.float32)
        return Speaker(lm, tokenizer, track_tokens(self.config, tokenizer))

    @cached_property
    def detokenizer(self) -> Detokenizer:
        upsample = self.settings.get("upsample_factor", UPSAMPLE)
        return Detokenizer.load(self.checkpoint, self.device, torch.float32, upsample)

    @cached_property
    def preset(self) -> Preset:
        """The run's way of streaming: pushes of `chunk_tokens`, the last one known as such."""
        settings = self.settings
        look_ahead = settings.get("look_ahead_tokens", UPSTREAM.look_ahead)
        chunk = settings.get("chunk_tokens", UPSTREAM.push_size(0))
        return Preset(
            name=STAGE,
            commits=(max(1, chunk - look_ahead), chunk),
            look_ahead=look_ahead,
            waits_for_next=True,
            seam=ReleaseSeam(),
            prompt_padding=UPSTREAM.prompt_padding,
            max_positions=settings.get("max_pos_size", UPSTREAM.max_positions),
            kv_window=settings.get("max_kv_cache_tokens", UPSTREAM.kv_window),
            ode_points=settings.get("ode_steps", UPSTREAM.ode_points),
            solver=settings.get("ode_solver") or settings.get("solver") or UPSTREAM.solver,
        )


# ---- sound files ------------------------------------------------------------------------------------------------


def _audio_cases(golden: _Set) -> Iterator[Case]:
    for path, expected in (golden.spec.get("audio") or {}).items():
        yield Case(STAGE, f"audio.{path}", partial(_compare_audio, golden, path, expected))


def _compare_audio(golden: _Set, path: str, expected: Mapping[str, Any], comparison: Comparison) -> None:
    wave = read_sound(golden.folder / path, golden.encoder.sample_rate)
    comparison.same_fields(wave_facts(wave) | {"vq_codes": golden.encoder.vq.encode([wave])[0]}, expected)


# ---- conversations ----------------------------------------------------------------------------------------------


def _compare_case(golden: _Set, case: Mapping[str, Any], comparison: Comparison) -> None:
    prompt = _prompt(golden, case)
    layout = {
        "prompt_audio_ids": prompt.audio_ids,
        "prompt_text_ids": prompt.text_ids,
        "is_continuous_mask": prompt.is_continuous,
    }
    comparison.same_fields(layout, case)
    if "continuous_feature_frames" in case:
        frames = [len(rows) for rows in prompt.features or ()]
        comparison.same("continuous_feature_frames", frames, case["continuous_feature_frames"] or [])
    options = GenerateOptions(
        output_type=case["output_type"],
        max_steps=budget(prompt, case["output_type"], case.get("max_new_tokens"), golden.config),
        sampling=Sampling.from_arguments(case.get("sampling") or {}),
        uniforms=injected(case.get("uniforms")),
    )
    result = compare_answer(comparison, golden.speaker, prompt_row(prompt), options, case)
    if case["output_type"] == "both":
        _compare_speech(golden, case, result.audio_codes, comparison)


def _prompt(golden: _Set, case: Mapping[str, Any]) -> Prompt:
    located = [_located(golden.folder, message) for message in case["messages"]]
    messages = parse_conversation(located, golden.config, must_end_with_user=False)
    waves = _heard(golden, messages) if any(message.audio for message in messages) else {}
    clips = encode_clips(messages, waves, golden.encoder) if waves else {}
    return build_prompt(messages, clips, case["output_type"], golden.config, golden.speaker.tokenizer)


def _heard(golden: _Set, messages: Sequence[Message]) -> dict[int, np.ndarray]:
    """The waveforms of a conversation's sound files, which are part of the set."""
    try:
        return load_clips(messages, golden.encoder.sample_rate)
    except AudioError as error:
        raise GoldenSetError(str(error)) from error


def _located(folder: Path, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its sound file below the set's folder."""
    content = message.get("content")
    if message["message_type"] == "audio" and content is not None:
        content = str(folder / content)
    elif message["message_type"] == "audio-text" and content is not None:
        content = [None if content[0] is None else str(folder / content[0]), content[1]]
    return {**message, "content": content}


# ---- speech -----------------------------------------------------------------------------------------------------


def _compare_speech(golden: _Set, case: Mapping[str, Any], codes: Sequence[int], comparison: Comparison) -> None:
    """Chunk plan and waveform, from the codes that this library generated."""
    if not codes:
        comparison.same_fields({"wav_samples": 0}, case)
        return
    plan = list(pushes(golden.preset, codes))
    stored = read_tensors(golden.folder / (case.get("file") or f"{case['name']}.safetensors"))
    pieces = _synthesised(golden, plan, stored)
    for index, (push, piece, expected) in enumerate(zip(plan, pieces, case.get("chunks") or (), strict=False)):
        actual = {"tokens": len(push.tokens), "is_final": push.final, "samples": len(piece)}
        comparison.same_fields(actual, expected, f" of chunk {index}")
    wave = torch.cat(pieces)
    comparison.same_fields({"n_chunks": len(plan), "wav_samples": len(wave)}, case)
    compare_wave(comparison, "wav", wave, stored["wav"], WAVE_TOLERANCE)


def _synthesised(golden: _Set, plan: Sequence[Push], stored: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What each push gives out, behind the stored starting noise."""
    synthesis = golden.detokenizer.stream(golden.preset, 0, lambda i, _: stored[f"chunk{i}.noise"].float())
    return [synthesis.push(push.tokens, push.final) for push in plan]
