"""Whether memory grows with the number of turns, and what loading needs beside the model itself.

    python -m benchmarks.memory [DIR] [--turns 200] [--seconds 12]

prints JSON: resident memory after some of the turns of generating speech, its peak, and for loading the
peak above the size of the weights. Without DIR a checkpoint with random weights is made, tiny and with a still smaller
detokenizer, since not its speed is measured.

Before the first turn every length that a last chunk can have is synthesised once: torch's CPU backend (oneDNN) keeps a
compiled kernel per shape and layer, some MB for each new length, which is warm-up and not growth with turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kimia.model.checkpoint_presets import PRESETS
from kimia.model.presets import find_preset
from kimia.model.prompt import TOKEN_RATE
from kimia.model.random_weights import new_checkpoint
from kimia.pipeline import KimiAudio, Options

PRESETS["smallest"] = replace(
    PRESETS["tiny"],
    flow={"hidden_size": 64, "depth": 2, "num_heads": 2},
    vocoder={
        "upsample_initial_channel": 128,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
    },
)
MARKS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 500, 1000)
OPTIONS: Options = {"preset": "low-latency", "audio_temperature": 0.8, "text_temperature": 0.8}
QUESTION = [{"role": "user", "message_type": "text", "content": "Please tell me a long story about the sea."}]


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MB: VmRSS (resident now) or VmHWM (its peak), mapped file pages included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Let VmHWM start again from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def weights_mb(model: KimiAudio) -> float:
    """Size of all weights and buffers in memory."""
    modules: list[nn.Module] = [model.lm, model.encoder.vq, model.encoder.whisper.encoder]
    if model.detokenizer is not None:
        modules += [model.detokenizer.dit, model.detokenizer.vocoder]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def loading(folder: Path) -> tuple[KimiAudio, dict[str, float]]:
    """Load the model; its size, and the peak above what was there before."""
    import transformers.models.whisper.modeling_whisper  # noqa: F401 (its import is not part of loading)

    before = memory_mb("VmRSS")
    reset_peak()
    model = KimiAudio(folder, device="cpu", dtype=torch.float32)
    peak = memory_mb("VmHWM") - before
    size = weights_mb(model)
    return model, {"weights_mb": size, "peak_mb": peak, "above_weights_mb": peak - size}


def warm_up(model: KimiAudio) -> None:
    """Let the detokenizer see every shape that a turn can bring it."""
    assert model.detokenizer is not None
    preset = find_preset(OPTIONS["preset"])
    grown = sum(preset.commits) + preset.look_ahead
    for rest in range(preset.commits[-1] + 1):
        codes = [index % model.config.audio_codes for index in range(grown + rest)]
        model.detokenizer.synthesize(codes, preset, seed=0)


def turns(model: KimiAudio, count: int, seconds: float) -> dict[str, Any]:
    """Resident memory after the marked turns, each a spoken answer of `seconds`."""
    steps = int(seconds * TOKEN_RATE) + model.config.audio_delay
    resident: dict[str, float] = {}
    peaks: dict[str, float] = {}
    audio_seconds = 0.0
    for turn in range(1, count + 1):
        wav, _ = model.generate(QUESTION, "both", max_new_tokens=steps, seed=turn, **OPTIONS)
        audio_seconds += 0.0 if wav is None else wav.shape[-1] / model.sample_rate
        if turn in MARKS or turn == count:
            gc.collect()
            resident[str(turn)] = memory_mb("VmRSS")
            peaks[str(turn)] = memory_mb("VmHWM")
            print(f"\nturn {turn}: {resident[str(turn)]:.1f} MB, peak {peaks[str(turn)]:.1f} MB", file=sys.stderr)
        print(f"\rturn {turn}/{count}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {"turns": count, "audio_seconds": audio_seconds, "rss_mb_after_turn": resident, "peak_mb_by_turn": peaks}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Memory over many turns and of loading, as JSON.")
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint folder (default: a new tiny one)")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of each answer (12)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or new_checkpoint(Path(scratch) / "model", "smallest", progress=False)
        model, load = loading(folder)
        warm_up(model)
        print(json.dumps({"loading": load, **turns(model, args.turns, args.seconds)}, indent=1))


if __name__ == "__main__":
    main()
