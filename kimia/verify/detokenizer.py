"""Golden sets of the detokenizer: streams push by push, single networks and functions, time grids.

`goldens.json` holds the cases and the tolerances, `stream_<case>.safetensors` the tokens, noise, mels and waveforms,
`unit.safetensors` inputs and outputs of the parts, `time_grid.json` the evaluations of the solvers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimia.errors import GoldenSetError
from kimia.model.bigvgan import mel_spectrogram
from kimia.model.checkpoint import Checkpoint
from kimia.model.crossfade import ReleaseSeam
from kimia.model.detokenize import UPSAMPLE, Detokenizer, Synthesis
from kimia.model.dit import Prefix, time_sinusoid
from kimia.model.flow import NAIVE_EULER, NEURAL_ODE_EULER, solve, time_grid
from kimia.model.presets import UPSTREAM, Preset
from kimia.verify.files import compare_wave, full_scale, listed, read_json, read_tensors
from kimia.verify.report import Case, Comparison

STAGE = "detokenizer"
TOLERANCE = 5e-5  # of time embedding, snake and window, which goldens.json does not name
TOLERANCES = {"dit": 5e-5, "mel": 2e-4, "wav": 1e-4, "mel_extraction": 1e-4}  # where goldens.json names none
STEP_TOLERANCE = 1e-6  # of an ODE step's size, computed in float64

COUNTERS = {  # of a push: stored name -> field of Report
    "start_position": "start_position",
    "frames_in": "frames_in",
    "frames_committed": "frames_committed",
    "kv_tokens_after": "kv_frames_after",
    "next_start_position": "next_start_position",
    "samples_out": "samples_out",
    "held_samples": "held_samples",
    "held_mel_frames": "held_mel_frames",
}
SLICE = re.compile(r"(?P<file>[^:]+):(?P<key>[^\[/]+?)\s*(\[(?P<begin>\d*):(?P<end>\d*)\])?\s*(/\s*(?P<scale>[\d.]+))?")
WINDOW = re.compile(r"hamming\.(\d+)(?:_first(\d+))?")
SOLUTION = re.compile(r"(ode|naive)(\d+)")
SOLVERS = {"ode": NEURAL_ODE_EULER, "naive": NAIVE_EULER}


class _Set:
    """The files of a set, and the networks of its checkpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.spec: Mapping[str, Any] = read_json(folder / "goldens.json")

    @cached_property
    def detokenizer(self) -> Detokenizer:
        root = self.folder / (self.spec.get("checkpoint") or "checkpoint")
        return Detokenizer.load(Checkpoint(root, vq_tokenizer=root), self.device, torch.float32)

    @cached_property
    def unit(self) -> dict[str, torch.Tensor]:
        path = self.folder / "unit.safetensors"
        return read_tensors(path) if path.exists() or self.spec.get("unit_shapes") else {}

    def tolerance(self, what: str) -> float:
        """One of dit, mel, wav, mel_extraction."""
        return float((self.spec.get("tolerances_float32") or {}).get(what, TOLERANCES[what]))

    def field(self, case: Mapping[str, Any], name: str, default: Any) -> Any:
        """A field of a case, else of the whole set, else the release's."""
        return case.get(name, self.spec.get(name, default))


def listings(folder: Path, device: torch.device) -> Iterator[Iterator[Case]]:
    """Streams, parts and time grids of a set; networks are loaded when the first case needs them."""
    golden = _Set(folder, device)
    yield listed(STAGE, "goldens", golden.spec.get("cases") or {}, partial(_compare_stream, golden))
    yield _unit_cases(golden)
    yield _grid_cases(folder / "time_grid.json")


# ---- streams ----------------------------------------------------------------------------------------------------


def _compare_stream(golden: _Set, case: Mapping[str, Any], comparison: Comparison) -> None:
    stored = read_tensors(golden.folder / (case.get("file") or f"stream_{case['name']}.safetensors"))
    detokenizer = replace(golden.detokenizer, upsample=golden.field(case, "upsample", UPSAMPLE))
    synthesis = detokenizer.stream(_preset(golden, case), 0, lambda i, _: stored[f"chunk{i}.noise"].float())
    if case.get("prefill"):
        _compare_prefill(golden, synthesis, case["prefill"], stored, comparison)
    tokens, total = stored["tokens"].tolist(), 0
    counters = case.get("per_chunk") or [{}] * len(case["chunks"])
    comparison.same("number of tokens", len(tokens), sum(case["chunks"]))
    for index, (count, expected) in enumerate(zip(case["chunks"], counters, strict=True)):
        pushed, tokens = tokens[:count], tokens[count:]
        pcm = synthesis.push(pushed, final=index + 1 == len(case["chunks"]))
        total += len(pcm)
        _compare_push(golden, synthesis, index, pcm, stored, comparison)
        counted = {name: getattr(synthesis.report, field) for name, field in COUNTERS.items()}
        comparison.same_fields(counted, expected, f" of chunk {index}")
    whole = sum(case["chunks"]) * detokenizer.samples_per_token
    comparison.same_fields({"total_samples": total, "expected_samples": whole}, case)


def _preset(golden: _Set, case: Mapping[str, Any]) -> Preset:
    look_ahead = golden.field(case, "look_ahead_tokens", UPSTREAM.look_ahead)
    first, *later = case["chunks"][:-1] or [look_ahead + 1]  # the final push commits all that is left
    return Preset(
        name=STAGE,
        commits=(first - look_ahead, *later),
        look_ahead=look_ahead,
        waits_for_next=True,
        seam=ReleaseSeam(),
        prompt_padding=UPSTREAM.prompt_padding,
        max_positions=golden.field(case, "max_pos_size", UPSTREAM.max_positions),
        kv_window=golden.field(case, "max_kv_cache_tokens", UPSTREAM.kv_window),
        ode_points=golden.field(case, "ode_step", UPSTREAM.ode_points),
        solver=golden.field(case, "solver", UPSTREAM.solver),
    )


def _compare_push(
    golden: _Set,
    synthesis: Synthesis,
    index: int,
    pcm: torch.Tensor,
    stored: Mapping[str, torch.Tensor],
    comparison: Comparison,
) -> None:
    mel, wave = stored.get(f"chunk{index}.mel"), stored.get(f"chunk{index}.wav")
    if mel is not None and synthesis.report is not None:
        comparison.close(f"mel of chunk {index}", synthesis.report.mel, mel, golden.tolerance("mel"))
    if wave is not None:
        compare_wave(comparison, f"wav of chunk {index}", pcm, wave, golden.tolerance("wav"))


def _compare_prefill(
    golden: _Set,
    synthesis: Synthesis,
    prefill: Mapping[str, Any],
    stored: Mapping[str, torch.Tensor],
    comparison: Comparison,
) -> None:
    """Let a stored prompt be heard; its tokens are one per mel frame unless the case says otherwise."""
    tokens = stored["prefill.tokens_50hz"] if "prefill.tokens_50hz" in stored else stored["prefill.tokens"]
    if not prefill.get("tokens_are_50hz", True):
        tokens = tokens.repeat_interleave(synthesis.detokenizer.upsample)
    synthesis.prefill(_stored_wave(golden.folder, prefill["wav"]), tokens.tolist(), prefill["chunk_size"])
    actual = {
        "frames": len(tokens),
        "kv_tokens_after": synthesis.kv_frames,
        "start_position_after": synthesis.position,
    }
    comparison.same_fields(actual, prefill, " of the prefill")


def _stored_wave(folder: Path, source: str) -> torch.Tensor:
    """A waveform named like `file:key[begin:end] / scale`; slice and scale may be absent."""
    match = SLICE.fullmatch(source.strip())
    if match is None:
        raise GoldenSetError(f"{folder}: {source!r} is no waveform of the form `file:key[:n] / scale`")
    wave = read_tensors(folder / match["file"])[match["key"].strip()].flatten()
    begin, end = match["begin"], match["end"]
    wave = wave[int(begin) if begin else None : int(end) if end else None]
    return wave.float() / float(match["scale"]) if match["scale"] else full_scale(wave)


# ---- parts ------------------------------------------------------------------------------------------------------


def _unit_cases(golden: _Set) -> Iterator[Case]:
    """One case per part that `unit.safetensors` has outputs of; `ode` alone holds inputs."""
    names = {}.fromkeys(_unit_name(key) for key in golden.unit)
    for name in (name for name in names if name != "ode"):
        compare = _unit_comparison(name)
        run = None if compare is None else partial(compare, golden, name)
        yield Case(STAGE, f"unit.{name}", run, "" if run else "this version knows no such part")


def _unit_name(key: str) -> str:
    """`dit.a.velocity` belongs to dit.a, everything else to its first word."""
    first, *rest = key.split(".")
    return f"{first}.{rest[0]}" if first == "dit" else first


def _unit_comparison(name: str) -> Callable[[_Set, str, Comparison], None] | None:
    kinds: dict[str, Callable[[_Set, str, Comparison], None]] = {
        r"time": _compare_time,
        r"dit\..+": _compare_dit,
        SOLUTION.pattern: _compare_solution,
        r"vocoder": _compare_vocoder,
        r"snake": _compare_snake,
        r"hamming": _compare_windows,
        r"mel\d*": _compare_mel,
    }
    return next((compare for pattern, compare in kinds.items() if re.fullmatch(pattern, name)), None)


def _compare_time(golden: _Set, name: str, comparison: Comparison) -> None:
    times = golden.unit[f"{name}.t"].to(golden.device)
    comparison.close("sinusoid", time_sinusoid(times), golden.unit[f"{name}.sinusoid"], TOLERANCE)
    with torch.inference_mode():
        comparison.close("emb", golden.detokenizer.dit.t_embedder(times), golden.unit[f"{name}.emb"], TOLERANCE)


def _compare_dit(golden: _Set, name: str, comparison: Comparison) -> None:
    """One evaluation. A part that starts where the one before it ends continues with its keys and values."""
    prefix, after = None, None
    for part in sorted({_unit_name(key) for key in golden.unit if key.startswith("dit.")}):
        start = int(golden.unit[f"{part}.start_position"])
        prefix = prefix if start == after else None
        actual, prefix = _evaluate(golden, part, start, prefix)
        after = start + len(golden.unit[f"{part}.x"])
        if part == name:
            break
    for key, value in actual.items():
        if f"{name}.{key}" in golden.unit:
            comparison.close(key, value, golden.unit[f"{name}.{key}"], golden.tolerance("dit"))


@torch.inference_mode()
def _evaluate(golden: _Set, part: str, start: int, prefix: Prefix | None) -> tuple[dict[str, torch.Tensor], Prefix]:
    """Velocity, block outputs (T, D), keys and values (T, H, d) of one evaluation, and the prefix that it leaves."""
    dit = golden.detokenizer.dit
    x, tokens = golden.unit[f"{part}.x"].float(), golden.unit[f"{part}.tokens"]
    chunk = dit.chunk(tokens[None], len(x) // len(tokens), start, prefix or dit.empty_prefix())
    actual: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            actual[name] = output.flatten(1, 2)[0]

        return hook

    hooks = [block.register_forward_hook(keep(f"block{i}_out")) for i, block in enumerate(dit.blocks)]
    try:
        times = dit.embed_times((int(golden.unit[f"{part}.t"]),))
        actual["velocity"] = dit(x[None].to(dit.device), times, chunk)[0]
    finally:
        for hook in hooks:
            hook.remove()
    for i in range(len(dit.blocks)):
        for kind, held in (("k", chunk.cache.keys), ("v", chunk.cache.values)):
            actual[f"layer{i}_{kind}"] = held[i, 0, :, -len(x) :].transpose(0, 1)
    return actual, chunk.cache


@torch.inference_mode()
def _compare_solution(golden: _Set, name: str, comparison: Comparison) -> None:
    """A chunk without prefix from position 0, de-normalised; the key names solver and points: ode30, naive30."""
    match = SOLUTION.fullmatch(name)
    if match is None:
        raise GoldenSetError(f"{name!r} names no solver and number of points")
    dit, noise, tokens = golden.detokenizer.dit, golden.unit["ode.noise"].float(), golden.unit["ode.tokens"]
    chunk = dit.chunk(tokens[None], len(noise) // len(tokens), 0, dit.empty_prefix())
    x = solve(dit, noise[None].to(dit.device), chunk, time_grid(int(match[2]), SOLVERS[match[1]]))
    mel = x[0] * dit.config.mel_std + dit.config.mel_mean
    comparison.close("mel", mel, golden.unit[f"{name}.mel"], golden.tolerance("mel"))


@torch.inference_mode()
def _compare_vocoder(golden: _Set, name: str, comparison: Comparison) -> None:
    mel = golden.unit[f"{name}.mel"].to(golden.device)  # (F, M)
    wave = golden.detokenizer.vocoder(mel.T[None])[0]
    compare_wave(comparison, "wav", wave, golden.unit[f"{name}.wav"], golden.tolerance("wav"))


@torch.inference_mode()
def _compare_snake(golden: _Set, name: str, comparison: Comparison) -> None:
    """The activation of `resblocks.0.activations.0` and its filters."""
    vocoder: Any = golden.detokenizer.vocoder
    activation = vocoder.get_submodule("resblocks.0.activations.0")
    actual = {
        "y": activation(golden.unit[f"{name}.x"][None].to(golden.device))[0],
        "filter_up": activation.upsample.filter.flatten(),
        "filter_down": activation.downsample.lowpass.filter.flatten(),
    }
    for key, value in actual.items():
        if f"{name}.{key}" in golden.unit:
            comparison.close(key, value, golden.unit[f"{name}.{key}"], TOLERANCE)


def _compare_windows(golden: _Set, name: str, comparison: Comparison) -> None:
    """Cross-fade windows: `hamming.<length>`, whole or its `_first<n>`."""
    for key in (key for key in golden.unit if key.startswith(f"{name}.")):
        match = WINDOW.fullmatch(key)
        if match is None:
            raise GoldenSetError(f"unit.safetensors: {key!r} does not say which window it is")
        window = torch.hamming_window(int(match[1]), device=golden.device)
        comparison.close(key, window[: int(match[2])] if match[2] else window, golden.unit[key], TOLERANCE)


def _compare_mel(golden: _Set, name: str, comparison: Comparison) -> None:
    wave = full_scale(golden.unit[f"{name}.wav"]).flatten().to(golden.device)
    mel = mel_spectrogram(wave, golden.detokenizer.vocoder.config)
    comparison.close("mel", mel, golden.unit[f"{name}.mel"], golden.tolerance("mel_extraction"))


# ---- time grids -------------------------------------------------------------------------------------------------


def _grid_cases(path: Path) -> Iterator[Case]:
    for points, expected in (read_json(path) if path.exists() else {}).items():
        yield Case(STAGE, f"time_grid.{points}", partial(_compare_grids, points, expected))


def _compare_grids(points: str, expected: Mapping[str, Any], comparison: Comparison) -> None:
    for solver, stored in expected.items():
        grid = time_grid(int(points), solver)
        steps = np.array([0.0, *grid.sizes[:-1]], np.float32)
        actual = {
            "evals": len(grid.indices),
            "t_index": grid.indices,
            "t_float": np.add.accumulate(steps, dtype=np.float32),
        }
        comparison.same_fields(actual, stored, f" of {solver}")
        if "step" in stored:
            comparison.close(f"{solver} step", grid.sizes, [stored["step"]] * len(grid.sizes), STEP_TOLERANCE)
