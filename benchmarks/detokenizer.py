"""The detokenizer: what it costs to go on behind another worker, from its committed mels and without them.

    python -m benchmarks.detokenizer [--sizes smallest,tiny,150m] [--seconds 6,24] [--preset low-latency] [--repeats 5]

prints JSON. Weights are random; `150m` has a flow model of 151 million parameters and the vocoder
of `tiny`. Every repeat runs both ways one after the other; medians, and the ratio of each pair.

take_over   after so many seconds of speech: `restore` against synthesising the same pushes again, in ms, and the
            bytes of mel that must be fetched
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kimia.model.checkpoint import open_checkpoint
from kimia.model.checkpoint_presets import PRESETS as CHECKPOINTS
from kimia.model.chunking import Push, pushes
from kimia.model.detokenize import Detokenizer
from kimia.model.presets import Preset, find_preset
from kimia.model.prompt import TOKEN_RATE
from kimia.model.random_weights import new_checkpoint

SIZES: dict[str, dict[str, Any]] = {
    "smallest": {
        "flow": {"hidden_size": 64, "depth": 2, "num_heads": 2},
        "vocoder": {
            "upsample_initial_channel": 128,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
        },
    },
    "tiny": {},
    "150m": {"flow": {"hidden_size": 1024, "depth": 8, "num_heads": 16}},
}


def random_detokenizer(size: str) -> Detokenizer:
    """The detokenizer of a checkpoint that is `tiny` but for it, float32 on the CPU."""
    CHECKPOINTS[size] = replace(CHECKPOINTS["tiny"], **SIZES[size])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(str(new_checkpoint(f"{folder}/model", size)))
        return Detokenizer.load(checkpoint, "cpu", torch.float32)


def parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(tensor.numel() for tensor in module.parameters())


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


# ---- take-over --------------------------------------------------------------------------------------------------


def take_over(detokenizer: Detokenizer, preset: Preset, seconds: float, repeats: int) -> dict[str, Any]:
    """Both ways to stand behind so many seconds of speech."""
    codes = [index % detokenizer.codes for index in range(round(seconds * TOKEN_RATE))]
    made = [push for push in pushes(preset, codes) if not push.final]
    synthesis, mels = detokenizer.stream(preset, seed=1), []
    for push in made:
        synthesis.push(push.tokens)
        assert synthesis.report is not None
        assert synthesis.report.committed is not None
        mels.append(synthesis.report.committed)
    pairs = []
    for _ in range(repeats):
        restored = milliseconds(lambda: detokenizer.stream(preset, seed=1).restore(made, mels))
        pairs.append((restored, milliseconds(lambda: _again(detokenizer, preset, made))))
    return {
        "pushes": len(made),
        "mel_bytes": sum(mel.numel() * mel.element_size() for mel in mels),
        "restored_ms": round(statistics.median(restored for restored, _ in pairs), 1),
        "synthesised_again_ms": round(statistics.median(again for _, again in pairs), 1),
        "ratio": round(statistics.median(again / restored for restored, again in pairs), 1),
    }


def _again(detokenizer: Detokenizer, preset: Preset, made: list[Push]) -> None:
    synthesis = detokenizer.stream(preset, seed=1)
    for push in made:
        synthesis.push(push.tokens)


# ---- command ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--seconds", default="6,24")
    parser.add_argument("--preset", default="low-latency")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    preset, found = find_preset(args.preset), {}
    for size in args.sizes.split(","):
        detokenizer = random_detokenizer(size)
        found[size] = {
            "flow_parameters": parameters(detokenizer.dit),
            "vocoder_parameters": parameters(detokenizer.vocoder),
            "take_over": {
                seconds: take_over(detokenizer, preset, float(seconds), args.repeats)
                for seconds in args.seconds.split(",")
            },
        }
    print(json.dumps({"preset": preset.name, "threads": args.threads, "sizes": found}, indent=1))


if __name__ == "__main__":
    main()
