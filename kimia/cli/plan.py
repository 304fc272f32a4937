"""`kimia plan`: how many GPUs so many calls need."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kimia.cli.arguments import add_model, add_quantize

if TYPE_CHECKING:
    from kimia.model.capacity import StagePlan, Times, Traffic
    from kimia.model.consistency import ModelConfigs
    from kimia.model.gpus import GPU

EPILOG = """\
examples:
  kimia plan --calls 200 --gpu h200
  kimia plan --calls 200 --gpu l40s --prompt 4000 --reuse 0.8
  kimia plan --calls 200 --gpu h200 --measured gpu.json      # times that benchmarks/gpu.sh has measured there

With --quantize more keys and values fit beside the weights; times stay those of bfloat16.
Without --measured times are floors, which no program can beat on such a GPU, times --over-floor; line one says which.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("--calls", type=int, required=True, metavar="N", help="calls at once")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h200, h100, a100, l40s, 4090 ...")
    call = parser.add_argument_group("what a call is like")
    call.add_argument(
        "--speech-share", type=float, default=0.45, metavar="X", help="of its time it is spoken to (0.45)"
    )
    call.add_argument("--turns-per-minute", type=float, default=4.0, metavar="X", help="answers (default 4)")
    call.add_argument("--question-seconds", type=float, default=5.0, metavar="S", help="of sound in a turn (default 5)")
    call.add_argument(
        "--prompt", type=int, default=2000, metavar="N", help="positions behind which a turn begins (2000)"
    )
    call.add_argument(
        "--reuse", type=float, default=0.0, metavar="X", help="share of them that need not be read again (default 0)"
    )
    times = parser.add_argument_group("what runs take")
    times.add_argument(
        "--measured", type=Path, metavar="FILE", help="a profile of benchmarks/gpu.sh, instead of floors"
    )
    times.add_argument("--over-floor", type=float, default=1.5, metavar="X", help="times the floors (default 1.5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model(parser, device=False)
    add_quantize(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from kimia.errors import ParameterError
    from kimia.model.capacity import Floors, Measured, Traffic, plan
    from kimia.model.gpus import find_gpu

    gpu = find_gpu(args.gpu)
    if not 1 <= args.over_floor < math.inf:
        raise ParameterError(
            f"no program is faster than its floor: --over-floor is a number from 1 on, got {args.over_floor:g}"
        )
    traffic = Traffic(
        args.calls, args.speech_share, args.turns_per_minute, args.question_seconds, args.prompt, args.reuse
    )
    configs = _configs(args)
    times: Times = Measured.read(args.measured) if args.measured else Floors(configs, gpu, args.over_floor)
    stages = plan(traffic, configs, gpu, times, quantized=bool(args.quantize))
    if args.json:
        print(json.dumps({"times": times.source, "gpu": gpu.name, "stages": [asdict(stage) for stage in stages]}))
    else:
        print(_page(traffic, gpu, times, stages, args.quantize))
    return 0


def _configs(args: argparse.Namespace) -> ModelConfigs:
    """Those of the model that was named, else the released dimensions."""
    if args.model:
        from kimia.model.checkpoint import open_checkpoint
        from kimia.model.consistency import read_configs

        return read_configs(open_checkpoint(args.model, args.vq_tokenizer))
    from kimia.model.checkpoint_presets import PRESETS
    from kimia.model.random_weights import preset_configs

    return preset_configs(PRESETS["7b"])


def _page(traffic: Traffic, gpu: GPU, times: Times, stages: list[StagePlan], scheme: str | None) -> str:
    lines = [
        f"times: {times.source}",
        f"{traffic.calls} calls on {gpu.name}: {sum(stage.replicas for stage in stages)} GPUs, one a replica",
    ]
    for stage in stages:
        lines += ["", f"{stage.stage}: {stage.replicas} x {stage.rows} rows", *(f"  {line}" for line in stage.why)]
    replicas = " ".join(f"{stage.stage}={stage.replicas}" for stage in stages)
    quantize = f" --quantize {scheme}" if scheme else ""
    return "\n".join([*lines, "", f"kimia up{quantize} --replicas {replicas}"])
