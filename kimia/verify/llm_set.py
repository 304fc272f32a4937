"""What the language model's golden sets are read through: files and prompts of stored conversations.

The clips of the conversations are given by name as codes and features (`audio_inputs` of prompts.json,
audio_features.safetensors), so no encoder takes part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kimia.errors import GoldenSetError
from kimia.model.config import LMConfig
from kimia.model.conversation import Message, parse_conversation
from kimia.model.encode import EncodedAudio
from kimia.model.lm import load_lm
from kimia.model.prompt import Encoded, Prompt, build_prompt, loss_masks
from kimia.model.text import TextTokenizer
from kimia.pipeline import CodesOnly, track_tokens
from kimia.verify.answers import Speaker
from kimia.verify.files import read_json, read_tensors
from kimia.verify.report import Comparison

STAGE = "llm"
TOLERANCE = 5e-5


class GoldenLM:
    """The files of a set, and its language model, each read when first needed."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.checkpoint = folder / "checkpoint"
        self.goldens = folder / "goldens"
        self.device = device

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the set; empty where the set has none."""
        path = self.goldens / name
        content = read_json(path) if path.exists() else {}
        if not isinstance(content, dict):
            raise GoldenSetError(f"{path}: must hold a mapping")
        return content

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A safetensors file of the set."""
        return read_tensors(self.goldens / name)

    @cached_property
    def config(self) -> LMConfig:
        """Of the language model."""
        return LMConfig.read(self.checkpoint / "config.json")

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of the text."""
        return TextTokenizer.load(self.checkpoint, self.config)

    @cached_property
    def speaker(self) -> Speaker:
        """The language model and what its loop needs."""
        lm = load_lm(self.checkpoint, device=self.device, dtype=torch.float32)
        return Speaker(lm, self.tokenizer, track_tokens(self.config, self.tokenizer))

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """prompts.json."""
        return self.json("prompts.json")

    @cached_property
    def features(self) -> dict[str, torch.Tensor]:
        """Continuous features by name of the clip."""
        if not (self.goldens / "audio_features.safetensors").exists():
            return {}
        stored = self.tensors("audio_features.safetensors")
        return {name.removeprefix("features."): tensor.float() for name, tensor in stored.items()}

    def clips(self, messages: Sequence[Message]) -> dict[int, Encoded]:
        """The named clips of a conversation by index of their message; unknown names are left out."""
        named = self.prompts.get("audio_inputs") or {}
        return {
            index: self._clip(str(message.audio), named[message.audio])
            for index, message in enumerate(messages)
            if message.audio in named
        }

    def _clip(self, name: str, given: Mapping[str, Any]) -> Encoded:
        codes = tuple(given["codes"])
        return EncodedAudio(codes, self.features[name]) if name in self.features else CodesOnly(codes)

    def prompt(self, case: Mapping[str, Any]) -> Prompt:
        """A stored conversation laid out."""
        raw = case["messages"]
        messages = parse_conversation(raw, self.config, must_end_with_user=False) if raw else ()
        start = case.get("add_assistant_start_msg", True)
        return build_prompt(messages, self.clips(messages), case["output_type"], self.config, self.tokenizer, start)

    def prompt_case(self, name: str) -> Mapping[str, Any]:
        """An entry of prompts.json by name."""
        return next(case for case in self.prompts["cases"] if case.get("name") == name)


def compare_layout(golden: GoldenLM, prompt: Prompt, case: Mapping[str, Any], comparison: Comparison) -> None:
    """Ids, masks and features of a prompt; prompts.json and decode.json name the ids differently."""
    audio_mask, text_mask = loss_masks(prompt)
    actual = {
        "audio_token_ids": prompt.audio_ids,
        "prompt_audio_ids": prompt.audio_ids,
        "text_token_ids": prompt.text_ids,
        "prompt_text_ids": prompt.text_ids,
        "is_continuous_mask": prompt.is_continuous,
        "audio_loss_mask": audio_mask,
        "text_loss_mask": text_mask,
    }
    comparison.same_fields(actual, case)
    order = case.get("continuous_feature_order")
    if order is None:
        return
    comparison.same("number of audio segments", len(prompt.segments), len(order))
    for name, rows in zip(order, prompt.features or (), strict=False):
        comparison.close(f"features of {name}", rows, golden.features[name][: len(rows)], 0.0)
