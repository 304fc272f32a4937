"""What each stage of a spoken turn costs: measured on any checkpoint and device, and computed for the 7B.

    python -m benchmarks.model [DIR] [--device cpu] [--dtype float32] [--bandwidth 3350] [--peak 990] [--threads 1]

prints JSON. `measured` (of a checkpoint folder DIR) holds medians in milliseconds and the shares of one turn (a
question of --question seconds, an answer of --answer seconds); `model_7b` the arithmetic of kimia.model.cost at the
released dimensions in bfloat16, each with its floor: the time below which no program can do it on a device of the
given bandwidth and peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kimia.model import cost
from kimia.model.checkpoint_presets import PRESETS as CHECKPOINTS
from kimia.model.consistency import ModelConfigs
from kimia.model.cost import Cost, Device
from kimia.model.detokenize import UPSAMPLE
from kimia.model.dit import Prefix
from kimia.model.flow import commit, solve
from kimia.model.generate import GenerateOptions, TrackTokens, generate
from kimia.model.lm import Row
from kimia.model.presets import LOW_LATENCY, UPSTREAM, Preset
from kimia.model.random_weights import preset_configs
from kimia.pipeline import KimiAudio

BFLOAT16_BYTES = 2
FLOAT32_BYTES = 4
NO_END: frozenset[int] = frozenset()  # random and trained models shall take the same number of steps


@dataclass(frozen=True)
class Turn:
    """The spoken turn that shares refer to."""

    question_seconds: float
    answer_seconds: float
    preset: Preset


# ---- measured ---------------------------------------------------------------------------------------------------


def median_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median milliseconds of `run`, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(model: KimiAudio, turn: Turn, repeats: int) -> dict[str, Any]:
    """Times of every stage in ms, and their shares of the turn."""
    wave = np.random.default_rng(0).normal(0, 0.1, int(turn.question_seconds * model.encoder.sample_rate))
    samples = wave.astype(np.float32)
    stages = {
        "vq_tokens": median_ms(lambda: model.encoder.vq.encode([samples]), repeats, model.device),
        "continuous_features": median_ms(lambda: model.encoder.whisper.encode([samples]), repeats, model.device),
    }
    prompt = _prompt(model, samples)
    stages |= _language_model(model, prompt, repeats)
    stages |= _detokenizer(model, turn.preset, repeats)
    return {"milliseconds": stages, "spoken_turn": _shares(model, stages, turn)}


def _prompt(model: KimiAudio, samples: np.ndarray) -> Row:
    encoded = model.encoder.encode([samples])[0]
    special, offset = model.tokenizer.special, model.config.token_offset
    codes = [offset + code for code in encoded.codes]
    audio = [special.user_start, special.media_begin, *codes, special.media_end, special.ctd, special.msg_end]
    audio.append(special.assistant_start)
    return Row(audio, [special.blank] * len(audio), [(2, len(codes))], [encoded.features])


def _step_times(model: KimiAudio, prompt: Row, tokens: TrackTokens, options: GenerateOptions) -> Iterator[float]:
    steps = generate(model.lm, prompt, tokens, options)
    while True:
        begin = time.perf_counter()
        if next(steps, None) is None:
            return
        yield 1e3 * (time.perf_counter() - begin)


def _language_model(model: KimiAudio, prompt: Row, repeats: int) -> dict[str, float]:
    """Prefill, and one decode step in each of the states that need less than everything. Drawing an id is included."""
    delay = model.config.audio_delay
    endless = replace(model.track_tokens, audio_ends=NO_END, text_eos=-1)
    silent = replace(model.track_tokens, audio_ends=NO_END)
    both = GenerateOptions("both", delay + 8 * repeats)

    def times(tokens: TrackTokens, options: GenerateOptions) -> list[float]:
        return list(_step_times(model, prompt, tokens, options))

    times(endless, replace(both, max_steps=2))
    full = times(endless, both)
    return {
        "prefill": statistics.median(times(endless, replace(both, max_steps=1))[0] for _ in range(repeats)),
        "decode_step_full": statistics.median(full[delay + 1 :]),
        "decode_step_during_delay": statistics.median(full[1:delay] or full),
        "decode_step_text_only": statistics.median(times(endless, replace(both, output_type="text"))[1:]),
        "decode_step_after_text_end": statistics.median(times(silent, replace(both, forced_text=()))[delay + 1 :]),
    }


def _steady_frames(preset: Preset) -> tuple[int, int]:
    """(mel frames solved, mel frames committed) of the preset's last, repeating push."""
    committed = preset.commits[-1]
    return (committed + preset.look_ahead) * UPSAMPLE, committed * UPSAMPLE


@torch.inference_mode()
def _detokenizer(model: KimiAudio, preset: Preset, repeats: int) -> dict[str, float]:
    """One steady chunk behind a full window, and its vocoding."""
    assert model.detokenizer is not None
    dit, vocoder = model.detokenizer.dit, model.detokenizer.vocoder
    frames, committed = _steady_frames(preset)
    config, grid = dit.config, preset.grid
    shape = (config.depth, 1, config.heads, preset.kv_window, config.head_dim)
    prefix = Prefix(*(torch.randn(shape, device=dit.device).to(dit.dtype) for _ in range(2)))
    tokens = torch.arange(frames // UPSAMPLE)[None] % config.audio_codes
    noise = torch.randn(1, frames, config.mel_bins, device=dit.device)
    mel = torch.randn(1, config.mel_bins, committed, device=dit.device) * config.mel_std + config.mel_mean

    def flow() -> None:
        chunk = dit.chunk(tokens, UPSAMPLE, preset.kv_window, prefix)
        solved = solve(dit, noise, chunk, grid)
        commit(dit, solved[:, :committed], chunk.head(committed // UPSAMPLE))

    return {
        "flow_chunk": median_ms(flow, repeats, model.device),
        "vocoder_chunk": median_ms(lambda: vocoder(mel), repeats, model.device),
    }


def _shares(model: KimiAudio, stages: dict[str, float], turn: Turn) -> dict[str, Any]:
    """Milliseconds and shares of the stages in one turn, all decode steps taken as full ones."""
    seconds_per_step = model.encoder.samples_per_position / model.encoder.sample_rate
    chunks = turn.answer_seconds / (turn.preset.commits[-1] * seconds_per_step)
    steps = turn.answer_seconds / seconds_per_step + model.config.audio_delay
    parts = {
        "encoder": stages["vq_tokens"] + stages["continuous_features"],
        "prefill": stages["prefill"],
        "decode": steps * stages["decode_step_full"],
        "flow": chunks * stages["flow_chunk"],
        "vocoder": chunks * stages["vocoder_chunk"],
    }
    total = sum(parts.values())
    return {
        "question_seconds": turn.question_seconds,
        "answer_seconds": turn.answer_seconds,
        "total_ms": total,
        "real_time_factor": total / 1e3 / turn.answer_seconds,
        "shares": {name: value / total for name, value in parts.items()},
    }


# ---- computed ---------------------------------------------------------------------------------------------------


def model_7b(device: Device, turn: Turn) -> dict[str, Any]:
    """The cost of every stage at the released dimensions, with its floor on the device."""
    configs = preset_configs(CHECKPOINTS["7b"])
    loads = _loads(configs, turn)
    return {
        "parameters": cost.parameter_counts(configs),
        "kv_cache_bytes_per_position": cost.kv_bytes_per_position(configs.lm, BFLOAT16_BYTES),
        "device": {"flop_per_second": device.flop_per_second, "bytes_per_second": device.bytes_per_second},
        "loads": {name: _row(load, device) for name, load in loads.items()},
    }


def _loads(configs: ModelConfigs, turn: Turn) -> dict[str, Cost]:
    lm, width = configs.lm, BFLOAT16_BYTES
    features = configs.vq_features
    positions = int(turn.question_seconds * features.sample_rate) // configs.samples_per_token
    vq_frames = positions * configs.vq.pooling_kernel
    steps = {
        f"decode step, {step.value}": cost.decode_step(lm, positions + 100, width, step) for step in cost.Step
    }  # fmt: skip
    return {
        "whisper segment (30 s)": cost.whisper_segment(configs.whisper, width),
        f"vq tokens of {turn.question_seconds:g} s": cost.vq_segment(configs.vq, vq_frames, FLOAT32_BYTES),
        f"prefill of {turn.question_seconds:g} s": cost.prefill(lm, positions + 6, positions, width),
        **steps,
        **_detokenizer_loads(configs),
    }


def _detokenizer_loads(configs: ModelConfigs) -> dict[str, Cost]:
    """Per second of audio: as released, with modulation per token, in the low-latency preset; and the vocoder."""
    assert configs.flow is not None
    assert configs.vocoder is not None
    frames_per_second = configs.vocoder.sample_rate / configs.vocoder.hop
    loads = {"vocoder per second of audio": cost.vocoder_chunk(configs.vocoder, int(frames_per_second), FLOAT32_BYTES)}
    for name, preset, repeat in (
        ("as released", UPSTREAM, 1),
        ("modulation per token", UPSTREAM, UPSAMPLE),
        ("low-latency preset", LOW_LATENCY, UPSAMPLE),
        ("low-latency preset in 10 steps", replace(LOW_LATENCY, ode_points=11), UPSAMPLE),
    ):
        per_second = cost.flow_second(configs.flow, preset, BFLOAT16_BYTES, repeat)
        loads[f"flow per second of audio, {name}"] = per_second
    return loads


def _row(load: Cost, device: Device) -> dict[str, float]:
    return {
        "gflop": load.flop / 1e9,
        "gigabytes": load.bytes / 1e9,
        "floor_ms": 1e3 * device.floor_seconds(load),
    }


# ---- command ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times and costs of every stage of a spoken turn, as JSON.")
    parser.add_argument("model", nargs="?", help="checkpoint folder; without it only the arithmetic is printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--bandwidth", type=float, default=3350.0, metavar="GB/s", help="for floors (default H100 SXM)")
    parser.add_argument("--peak", type=float, default=990.0, metavar="TFLOP/s", help="for floors (default H100 SXM)")
    parser.add_argument("--question", type=float, default=5.0, metavar="S", help="seconds of the question (5)")
    parser.add_argument("--answer", type=float, default=10.0, metavar="S", help="seconds of the answer (10)")
    parser.add_argument("--preset", default="upstream", choices=("upstream", "low-latency"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    return parser.parse_args()


def main() -> None:
    """Measure, compute, print."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = Device(args.peak * 1e12, args.bandwidth * 1e9)
    turn = Turn(args.question, args.answer, UPSTREAM if args.preset == "upstream" else LOW_LATENCY)
    report: dict[str, Any] = {"model_7b": model_7b(device, turn)}
    if args.model:
        model = KimiAudio(args.model, device=args.device, dtype=getattr(torch, args.dtype))
        report = {
            "model": args.model,
            "device": args.device,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "preset": args.preset,
            "measured": measure(model, turn, args.repeats),
            **report,
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
