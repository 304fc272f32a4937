"""`goldens/decode.json` of a language model's set: greedy runs, whole answers of upstream's API, single steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kimia.model.chunking import pushes
from kimia.model.generate import GenerateOptions
from kimia.model.lm import Row, stack
from kimia.model.presets import UPSTREAM
from kimia.model.prompt import steps_allowed
from kimia.model.sampler import Sampling
from kimia.pipeline import prompt_row
from kimia.verify.answers import budget, compare_answer, compare_logits, injected
from kimia.verify.files import CORRECTED, listed
from kimia.verify.llm_set import STAGE, TOLERANCE, GoldenLM, compare_layout
from kimia.verify.report import Case, Comparison

LOGITS = "decode_logits.safetensors"
ZERO_STEP = "text_id_zero_step"
TRACKS = ("text", "audio")


def decoding_cases(golden: GoldenLM) -> Iterator[Case]:
    """The cases of decode.json, none where the set has no such file."""
    decode = golden.json("decode.json")
    yield from listed(STAGE, "decode", decode.get("runs") or [], partial(_compare_run, golden))
    yield from listed(STAGE, "decode.generate_api", decode.get("generate_api") or [], partial(_compare_api, golden))
    if ZERO_STEP in decode:
        yield Case(STAGE, f"decode.{ZERO_STEP}", partial(_compare_zero_step, golden, decode[ZERO_STEP]))


def _compare_run(golden: GoldenLM, run: Mapping[str, Any], comparison: Comparison) -> None:
    """A turn from its conversation: prompt, raw choices, streams, results and, where stored, logits."""
    prompt = golden.prompt(run)
    compare_layout(golden, prompt, run, comparison)
    row = prompt_row(prompt)
    options = GenerateOptions(
        output_type=run["output_type"],
        max_steps=budget(prompt, run["output_type"], run.get("max_new_tokens"), golden.config),
        sampling=Sampling.from_arguments(run.get("sampling") or {}),
        uniforms=injected(run.get("uniforms")),
    )
    result = compare_answer(comparison, golden.speaker, row, options, run)
    stored = golden.tensors(LOGITS) if (golden.goldens / LOGITS).exists() else {}
    names = {track: f"{run.get('name')}.{track}_logits" for track in TRACKS}
    logits = {track: stored[name] for track, name in names.items() if name in stored}
    if logits and result.text_stream:
        compare_logits(comparison, golden.speaker.lm, row, result, logits)


def _compare_api(golden: GoldenLM, call: Mapping[str, Any], comparison: Comparison) -> None:
    """A whole call under upstream's budget rule (with speech the caller's max_new_tokens is ignored)."""
    prompt = golden.prompt(call)
    arguments = dict(call.get("kwargs") or {})
    limit = arguments.pop("max_new_tokens", None)
    steps = steps_allowed(len(prompt), call["output_type"], limit, golden.config, "upstream")
    options = GenerateOptions(
        call["output_type"], steps, Sampling.from_arguments(arguments), uniforms=injected(call.get("uniforms"))
    )
    result = compare_answer(comparison, golden.speaker, prompt_row(prompt), options, call)
    comparison.same(
        "wav_is_none", call["output_type"] == "text", call.get("wav_is_none", call["output_type"] == "text")
    )
    if "detokenizer_calls" in call:
        plan = _plan(result.audio_codes, call["detokenizer_calls"]) if call["output_type"] == "both" else []
        stored = [(list(push["tokens"]), push["is_final"]) for push in call["detokenizer_calls"]]
        comparison.same("detokenizer_calls", plan, stored)


def _plan(codes: Sequence[int], calls: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], bool]]:
    """Codes cut as the release cuts them, in pushes as long as the first stored one that is not the last."""
    whole = UPSTREAM.push_size(0)
    size = len(calls[0]["tokens"]) if len(calls) > 1 else max(whole, len(codes))
    preset = replace(UPSTREAM, commits=(max(1, size),), look_ahead=0)
    return [(list(push.tokens), push.final) for push in pushes(preset, codes)]


def _compare_zero_step(golden: GoldenLM, step: Mapping[str, Any], comparison: Comparison) -> None:
    """One step with text id 0, a token like any other. The release's own numbers, which drop it, are not compared."""
    prompt = golden.prompt(golden.prompt_case(step["prompt_case"]))
    row = prompt_row(prompt) if step.get("features", True) else replace(prompt_row(prompt), features=None)
    stored = golden.tensors(LOGITS)
    lm = golden.speaker.lm
    cache = lm.new_cache(rows=1)
    with torch.inference_mode():
        lm(stack([row], lm.device), cache)
        comparison.same("position", cache.lengths[0], step.get("position", cache.lengths[0]))
        activations = lm(stack([Row((step["fed_audio_id"],), (step["fed_text_id"],))], lm.device), cache)
    for variant in CORRECTED:
        for track in TRACKS:
            wanted = stored.get(f"{ZERO_STEP}.{variant}.{track}_logits")
            if wanted is not None:
                actual = getattr(activations, f"{track}_logits")[0, -1]
                comparison.close(f"{track} logits", actual, wanted, TOLERANCE)
