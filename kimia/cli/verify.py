"""`kimia verify`: prove an installation or a device against golden data, or measure what quantised weights cost."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kimia.cli.arguments import SCHEMES
from kimia.errors import KimiaError, ParameterError

if TYPE_CHECKING:
    from kimia.verify.report import Outcome

EXAMPLES = """\
DIR is one golden set or a folder of several; a set is the folder of a stage (tokenizer, llm, detokenizer, e2e) with its
tiny checkpoint and the numbers that the reference gave. Everything is computed in float32.

  kimia verify tests/golden
  kimia verify tests/golden/e2e --device cuda
  kimia verify checkpoints/micro --quantize int8              # what int8 costs: the model's own examples
  kimia verify MODEL --quantize fp8 call1.wav call2.wav       # or over the answers to these recordings

One line per case, the last line counts them:

  PASS|FAIL|SKIP stage file.name error<=tolerance

A case whose data cannot be read fails with the reason, and the report goes on. The exit code is 0 when all cases pass,
1 when one misses, 2 when there is no case or when data cannot be read.

With --quantize DIR is a model. It answers recordings; then it and its quantised version read the same prompts and
answers, and the report says how far their logits lie apart at the steps that draw a token, how often the greedy token
is the same, and what memory is saved. Nothing is judged; the exit code is 0.
"""
UNREADABLE = 2  # exit code


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument("folder", type=Path, metavar="DIR", help="a golden set or a folder of several; a model")
    parser.add_argument("recordings", type=Path, nargs="*", metavar="FILE", help="what is answered with --quantize")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--quantize", choices=SCHEMES, help="measure what such weights cost")


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code."""
    import torch

    from kimia.pipeline import choose_device
    from kimia.verify import verify

    if args.quantize:
        return _measure(args)
    if args.recordings:
        raise ParameterError("recordings are for --quantize; golden data brings its own")
    torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other
    counts: Counter[str] = Counter()
    try:
        for outcome in verify(args.folder, choose_device(args.device)):
            counts[outcome.status] += 1
            counts["unreadable"] += outcome.unreadable
            _show(outcome)
    except KimiaError as error:
        counts["unreadable"] += 1
        print(f"error: {error}", file=sys.stderr)
    compared = counts["PASS"] + counts["FAIL"]
    print(f"{counts['PASS']}/{compared} cases")
    if not compared and not counts["unreadable"]:
        print(f"error: {args.folder}: holds no case that can be compared", file=sys.stderr)
    if not compared or counts["unreadable"]:
        return UNREADABLE
    return 1 if counts["FAIL"] else 0


def _measure(args: argparse.Namespace) -> int:
    """Print what quantised weights cost."""
    from kimia.model.quantize import check_scheme
    from kimia.pipeline import KimiAudio, choose_device
    from kimia.verify.quantized import measure

    check_scheme(args.quantize, choose_device(args.device))  # before anything is loaded
    model = KimiAudio(args.folder, load_detokenizer=False, device=args.device)
    print(measure(model, args.quantize, args.recordings, args.folder))
    return 0


def _show(outcome: Outcome) -> None:
    if outcome.status == "ERROR":
        print(f"error: {outcome.detail}", file=sys.stderr)
    else:
        print(outcome, flush=True)
