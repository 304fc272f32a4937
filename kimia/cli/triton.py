"""`kimia triton`: NVIDIA Triton as the host of the encoders and the vocoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from kimia.cli.arguments import DTYPES, add_model, model_location

EPILOG = """\
examples:
  a model repository for a Triton server on the same GPU machine, where the checkpoint lies at the same place:
      kimia triton export repository --model /data/Kimi-Audio-7B-Instruct --device cuda
      tritonserver --model-repository repository
  then let tokenizer and detokenizer compute there:
      KIMIA_ENGINE=triton://localhost:8001 kimia up --model /data/Kimi-Audio-7B-Instruct

Triton's Python needs kimia and its model extra: pip install 'kimia[model]'. docs/deployment.md says more.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the one action and its arguments."""
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="action", required=True)
    export = actions.add_parser(
        "export",
        help="write a model repository: both encoders and the vocoder, with dynamic batching",
        description="Write a model repository for Triton's Python backend: kimia_vq, kimia_whisper, kimia_vocoder. "
        "It names the checkpoint and the fingerprint of its weights; the weights stay where they are.",
    )
    export.add_argument("folder", type=Path, metavar="DIR", help="folder of the repository")
    add_model(export)
    export.add_argument("--rows", type=int, default=8, metavar="N", help="rows of one batch at most (default 8)")
    export.add_argument(
        "--delay-us",
        type=int,
        default=2000,
        metavar="N",
        help="microseconds that a row waits for others (default 2000)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the repository, print its models."""
    import torch

    from kimia.model.checkpoint import open_checkpoint
    from kimia.pipeline import choose_device, choose_dtype
    from kimia.triton_export import Batching, export

    batching = Batching(args.rows, args.delay_us)
    device = choose_device(args.device)
    dtype = choose_dtype({name: getattr(torch, name) for name in DTYPES}.get(args.dtype), device)
    checkpoint = open_checkpoint(model_location(args), args.vq_tokenizer)
    for path in export(checkpoint, args.folder, device, dtype, batching):
        print(path)
    return 0
