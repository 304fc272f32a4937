"""Golden sets of the language model: prompts, activations, greedy runs, sampler distributions.

`goldens/decode.json` is compared in `kimia.verify.decoding`. Fine-tuning losses and gradients are only listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from kimia.errors import KimiaError
from kimia.model.conversation import parse_conversation
from kimia.model.lm import Activations, Row, stack
from kimia.model.prompt import build_prompt
from kimia.model.sampler import Sampling, TrackSampling, choose, distribution, penalise
from kimia.model.text import SYMBOLS
from kimia.verify.decoding import decoding_cases
from kimia.verify.files import listed
from kimia.verify.llm_set import STAGE, TOLERANCE, GoldenLM, compare_layout
from kimia.verify.report import Case, Comparison

__all__ = ["STAGE", "listings"]

PROBABILITY_TOLERANCE = 1e-6
ACCEPTED = ("audio_tokens_given",)  # listed as rejected for a defect of the release
SAMPLING = {  # name in a stored case -> field of TrackSampling
    "temperature": "temperature",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "window": "repetition_window",
}
ACTIVATIONS = [field.name for field in fields(Activations)]


def listings(folder: Path, device: torch.device) -> Iterator[Iterator[Case]]:
    """The cases of a set file by file; the model is loaded when the first case needs it."""
    golden = GoldenLM(folder, device)
    yield _prompt_cases(golden)
    yield _prefill_cases(golden)
    yield decoding_cases(golden)
    yield _sampler_cases(golden)
    yield _finetune_cases(golden)


def _finetune_cases(golden: GoldenLM) -> Iterator[Case]:
    finetune = golden.json("finetune.json")
    keys = [sample["key"] for sample in finetune.get("samples") or []] + [key for key in finetune if key == "batch"]
    for key in keys:
        yield Case(STAGE, f"finetune.{key}", skip="training is verified with its own trainer")


# ---- prompts ----------------------------------------------------------------------------------------------------


def _prompt_cases(golden: GoldenLM) -> Iterator[Case]:
    prompts = golden.prompts
    if "text_tokens" in prompts:
        yield Case(STAGE, "prompts.text_tokens", partial(_compare_text_tokens, golden))
    if "special_tokens" in prompts:
        yield Case(STAGE, "prompts.special_tokens", partial(_compare_special_tokens, golden))
    yield from listed(STAGE, "prompts", prompts.get("cases") or [], partial(_compare_prompt, golden))
    yield from listed(STAGE, "prompts.rejected", prompts.get("rejected") or [], partial(_compare_rejected, golden))


def _compare_text_tokens(golden: GoldenLM, comparison: Comparison) -> None:
    for text, ids in golden.prompts["text_tokens"].items():
        comparison.same(repr(text), golden.tokenizer.encode(text), ids)


def _compare_special_tokens(golden: GoldenLM, comparison: Comparison) -> None:
    special, prompts = golden.tokenizer.special, golden.prompts
    resolved = {name: getattr(special, field) for field, name in SYMBOLS.items()}
    for name, token in prompts["special_tokens"].items():
        comparison.same(f"name of {token}", golden.tokenizer.token_bytes(token).decode(), name)
        comparison.same(name, resolved.get(name, token), token)
    actual = {"pad_id": special.pad, "eod_ids": sorted((special.msg_end, special.media_end))}
    for name in (name for name in actual if name in prompts):
        wanted = prompts[name]
        comparison.same(name, actual[name], sorted(wanted) if isinstance(wanted, list) else wanted)


def _compare_prompt(golden: GoldenLM, case: Mapping[str, Any], comparison: Comparison) -> None:
    compare_layout(golden, golden.prompt(case), case, comparison)


def _compare_rejected(golden: GoldenLM, case: Mapping[str, Any], comparison: Comparison) -> None:
    """The whole check of a conversation that is to be answered."""
    accepted = case.get("name") in ACCEPTED
    try:
        messages = parse_conversation(case["messages"], golden.config)
        build_prompt(messages, golden.clips(messages), case["output_type"], golden.config, golden.tokenizer)
    except KimiaError as error:
        comparison.same(f"refused ({error})", "refused", "accepted" if accepted else "refused")
    else:
        comparison.same("conversation", "accepted", "accepted" if accepted else "refused")


# ---- activations ------------------------------------------------------------------------------------------------


def _prefill_cases(golden: GoldenLM) -> Iterator[Case]:
    prefill = golden.json("prefill.json")
    yield from listed(STAGE, "prefill", prefill.get("cases") or {}, partial(_compare_prefill, golden))


def _compare_prefill(golden: GoldenLM, case: Mapping[str, Any], comparison: Comparison) -> None:
    """One pass over a stored prompt, everything on the way and the KV cache."""
    prefix = f"{case['name']}."
    stored = golden.tensors("prefill.safetensors")
    expected = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    row = _stored_row(golden, case, expected)
    comparison.same("length", len(row.audio_ids), case.get("length", len(row.audio_ids)))
    lm = golden.speaker.lm
    cache = lm.new_cache(rows=1)
    with torch.inference_mode():
        activations = lm(stack([row], lm.device), cache)
    for name in (name for name in ACTIVATIONS if name in expected):
        wanted = expected[name]  # logits: of the last positions only, in some cases
        comparison.close(name, getattr(activations, name)[0, -len(wanted) :], wanted, TOLERANCE)
    for name in (name for name in expected if name.startswith("kv.")):
        _, slot, kind = name.split(".")
        held = (cache.keys if kind == "k" else cache.values)[int(slot)]
        if held is None:
            comparison.fail(f"{name}: the cache holds nothing")
        else:
            comparison.close(name, held[0, :, : cache.lengths[0]], expected[name], TOLERANCE)


def _stored_row(golden: GoldenLM, case: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> Row:
    order: Sequence[str] = ()
    if case.get("features"):
        order = (case if "continuous_feature_order" in case else golden.prompt_case(case["prompt_case"]))[
            "continuous_feature_order"
        ]
    return Row(
        audio_ids=expected["audio_ids"].tolist(),
        text_ids=expected["text_ids"].tolist(),
        segments=_runs(expected["is_continuous_mask"].tolist()),
        features=[golden.features[name] for name in order],
    )


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, length) of each stretch of ones; stretches of neighbouring clips are parted by media symbols."""
    runs, begin = [], 0
    for value, group in groupby(mask):
        length = len(list(group))
        if value:
            runs.append((begin, length))
        begin += length
    return runs


# ---- sampler ----------------------------------------------------------------------------------------------------


def _sampler_cases(golden: GoldenLM) -> Iterator[Case]:
    sampler = golden.json("sampler.json")
    yield from listed(STAGE, "sampler", sampler.get("cases") or [], partial(_compare_sampler, golden))


def _sampling(case: Mapping[str, Any]) -> TrackSampling:
    """A stored case's parameters; those that are absent are the release's defaults of its head."""
    given = {field: case[name] for name, field in SAMPLING.items() if case.get(name) is not None}
    defaults: TrackSampling = getattr(Sampling(), case.get("head") or "text")
    return replace(defaults, **given)


def _compare_sampler(golden: GoldenLM, case: Mapping[str, Any], comparison: Comparison) -> None:
    """Penalised logits, log-probabilities, and what can be drawn; where the release raises, what it should give."""
    prefix = f"{case.get('key') or case['name']}."
    stored = golden.tensors("sampler.safetensors")
    expected = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    logits = expected["logits"]
    logits = logits.reshape(-1, logits.shape[-1])[-1:].to(golden.device)  # (1, V), the last position
    params = [_sampling(case)]
    histories = [case.get("recent") or []]
    penalised = penalise(logits, params, histories)
    actual = {"penalised_logits": penalised[0], "logprobs": penalised[0].log_softmax(-1)}
    for name in (name for name in actual if name in expected):
        comparison.close(name, actual[name], expected[name], TOLERANCE)
    ids, probabilities = distribution(penalised, params)
    if "probs" in expected:
        dense = torch.zeros(1, logits.shape[-1], dtype=torch.float64).scatter_(1, ids, probabilities)
        comparison.close("probs", dense[0], expected["probs"], PROBABILITY_TOLERANCE)
    if case.get("token") is not None:
        comparison.same("token", choose(logits, params, histories, [0.0]), [case["token"]])
    if case.get("candidates") is not None:
        comparison.same("candidates", sorted(ids[0].tolist()), sorted(case["candidates"]))
