"""Comparing a whole answer of the language model: the plain loop with everything stored, the fast loop's streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kimia.model.config import LMConfig
from kimia.model.generate import GenerateOptions, Result, Step, TrackTokens, Uniforms, collect, generate
from kimia.model.lm import DualTrackLM, Row, stack
from kimia.model.prompt import Prompt, steps_allowed
from kimia.model.text import TextTokenizer
from kimia.verify.report import Comparison

STREAMS = ("text_stream", "audio_stream", "stop", "steps")  # what the savings must not change
LOGIT_TOLERANCE = 5e-5


@dataclass(frozen=True, eq=False)
class Speaker:
    """What answers: weights, vocabulary, and the ids that steer the loop."""

    lm: DualTrackLM
    tokenizer: TextTokenizer
    tokens: TrackTokens


def injected(uniforms: Sequence[float] | None) -> Uniforms | None:
    """Stored uniform numbers, text and audio in turn: step i reads 2 i and 2 i + 1. None where nothing is drawn."""
    return None if uniforms is None else lambda track, step: uniforms[2 * step + track]


def budget(prompt: Prompt, output_type: Any, given: int | None, config: LMConfig) -> int:
    """Steps of a stored run: the budget in force, or upstream's rule where none is given."""
    if given is not None and given >= 0:
        return given
    return steps_allowed(len(prompt), output_type, given, config, "upstream")


def compare_answer(
    comparison: Comparison, speaker: Speaker, row: Row, options: GenerateOptions, expected: Mapping[str, Any]
) -> Result:
    """Run a turn both ways and compare what `expected` has of it; fields that are absent are not compared."""
    plain = list(generate(speaker.lm, row, speaker.tokens, replace(options, plain=True)))
    fast = list(generate(speaker.lm, row, speaker.tokens, replace(options, plain=False)))
    result = collect(plain, speaker.tokens, options.output_type)
    actual = _facts(plain, result, speaker.tokenizer)
    comparison.same_fields(actual, expected)
    saved = _facts(fast, collect(fast, speaker.tokens, options.output_type), speaker.tokenizer)
    for name in STREAMS:
        comparison.same(f"{name} of the fast path", saved[name], expected.get(name, actual[name]))
    return result


def _facts(steps: Sequence[Step], result: Result, tokenizer: TextTokenizer) -> dict[str, Any]:
    """An answer by the field names of the stored runs; several sets call the same thing differently."""
    return {
        "raw_text": [step.raw_text for step in steps],
        "raw_audio": [step.raw_audio for step in steps],
        "text_stream": result.text_stream,
        "audio_stream": result.audio_stream,
        "returned_text": result.returned_text,
        "returned_text_ids": result.returned_text,
        "returned_audio": result.returned_audio,
        "returned_audio_ids": result.returned_audio,
        "filtered_text_ids": result.text_ids,
        "text_ids": result.text_ids,
        "filtered_audio_codes": result.audio_codes,
        "audio_codes": result.audio_codes,
        "text": tokenizer.decode(result.text_ids),
        "stop": result.stop,
        "steps": len(steps),
    }


@torch.inference_mode()
def compare_logits(
    comparison: Comparison, lm: DualTrackLM, row: Row, result: Result, expected: Mapping[str, torch.Tensor]
) -> None:
    """Feed the answer's ids step by step through the full computation; `expected` has (steps, V) per track."""
    cache = lm.new_cache(rows=1)
    feed = row
    rows: dict[str, list[torch.Tensor]] = {track: [] for track in expected}
    for audio_id, text_id in zip(result.audio_stream, result.text_stream, strict=True):
        activations = lm(stack([feed], lm.device), cache)
        for track, logits in rows.items():
            logits.append(getattr(activations, f"{track}_logits")[0, -1])
        feed = Row((audio_id,), (text_id,))
    for track, logits in rows.items():
        comparison.close(f"{track} logits", torch.stack(logits), expected[track], LOGIT_TOLERANCE)
