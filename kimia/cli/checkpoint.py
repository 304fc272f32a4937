"""`kimia checkpoint`: create, inspect or convert a model folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimia.model.inventory import Inventory, Part

EPILOG = """\
examples:
  a model with random weights, to try things out in seconds and without a download:
      kimia checkpoint new --preset tiny model
  one with the released dimensions (30 GB), for measurements:
      kimia checkpoint new --preset 7b /data/random-7b
  what a folder holds, whether it is complete, under which licences, and how long it takes to load:
      kimia checkpoint inspect /data/Kimi-Audio-7B-Instruct
  shrink the detokenizer's 19 GB archive to the third that is the model:
      kimia checkpoint convert /data/Kimi-Audio-7B-Instruct
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their arguments."""
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="action", required=True)
    _configure_new(actions)
    _configure_inspect(actions)
    _configure_convert(actions)


def _configure_new(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    new = actions.add_parser(
        "new",
        help="write a model with random weights in the released layout",
        description="Write a model with random weights in exactly the released layout, all parts consistent. The "
        "folder appears when it is complete; an existing one is never touched. Its answers are noise.",
    )
    new.add_argument("folder", type=Path, metavar="DIR", help="folder to create")
    new.add_argument(
        "--preset",
        required=True,
        choices=("tiny", "7b"),
        help="tiny: 16 MB, answers at once on any CPU; 7b: the released dimensions, 30 GB",
    )
    new.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights (default 0)")
    new.set_defaults(action=_new)


def _configure_inspect(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = actions.add_parser(
        "inspect",
        help="sizes, dimensions, licences, problems and loading time of a model",
        description="Show what each part of a model holds, whether it would load, under which licence it stands, and "
        "how long loading takes. Exit code 1 when something is wrong.",
    )
    inspect.add_argument("model", metavar="DIR", help="model folder, or a hub id owner/name (then it is downloaded)")
    inspect.add_argument("--vq-tokenizer", metavar="DIR", help="folder of glm-4-voice-tokenizer, where it lies apart")
    inspect.add_argument(
        "--no-load", action="store_true", help="check files, names and shapes only: needs no memory for the weights"
    )
    inspect.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="to load in (bfloat16)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(action=_inspect)


def _configure_convert(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = actions.add_parser(
        "convert",
        help="rewrite the detokenizer's torch archives as safetensors",
        description="Write audio_detokenizer/model.safetensors (only the model, without the training state around it) "
        "and vocoder/model.safetensors (weight norm folded, float32) beside the archives. Loading prefers them; the "
        "archives stay, and may be deleted afterwards.",
    )
    convert.add_argument("model", metavar="DIR", help="model folder")
    convert.add_argument("--vq-tokenizer", metavar="DIR", help="folder of glm-4-voice-tokenizer, where it lies apart")
    convert.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="how to store the flow model (default: as it is stored now)"
    )
    convert.set_defaults(action=_convert)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action and return the exit code."""
    return int(args.action(args))


def _new(args: argparse.Namespace) -> int:
    from kimia.model.random_weights import new_checkpoint

    folder = new_checkpoint(args.folder, args.preset, args.seed)
    print(f"{folder}: random weights, preset {args.preset}, seed {args.seed}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    import torch

    from kimia.model.checkpoint import open_checkpoint
    from kimia.model.inventory import take_inventory

    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    inventory = take_inventory(open_checkpoint(args.model, args.vq_tokenizer), dtype, measure=not args.no_load)
    if args.json:
        print(json.dumps(asdict(inventory) | {"bytes": inventory.bytes}, indent=1))
    else:
        print("\n".join(_lines(inventory)))
    return 1 if inventory.problems else 0


def _convert(args: argparse.Namespace) -> int:
    from kimia.model.checkpoint import open_checkpoint
    from kimia.model.convert import convert

    done = convert(open_checkpoint(args.model, args.vq_tokenizer), args.dtype)
    for item in done:
        print(f"{item.target}: {_size(item.target_bytes)}, from {item.archive.name} of {_size(item.archive_bytes)}")
    saved = sum(item.saved_bytes for item in done)
    print(
        f"the archives stay; once you delete them, {_size(saved)} of disk are saved" if saved > 0 else "none is smaller"
    )
    return 0


# ---- words ------------------------------------------------------------------------------------------------------


def _lines(inventory: Inventory) -> Iterator[str]:
    yield f"{inventory.root}: {_size(inventory.bytes)} (licences are those of the released weights)"
    for part in inventory.parts:
        yield ""
        yield from _part_lines(part)
    if inventory.special_tokens:
        yield ""
        yield "special tokens: " + ", ".join(f"{name} {token}" for name, token in inventory.special_tokens.items())
    yield ""
    measured = [part.load_seconds for part in inventory.parts if part.load_seconds is not None]
    if measured:
        yield f"cold start: {sum(measured):.1f} s to load {len(measured)} parts on the CPU"
    yield from (f"PROBLEM: {problem}" for problem in inventory.problems)
    yield "no problems found" if not inventory.problems else f"{len(inventory.problems)} problems found"


def _part_lines(part: Part) -> Iterator[str]:
    count = "does not load" if part.parameters is None else f"{part.parameters:,} parameters"
    timing = "" if part.load_seconds is None else f", loads in {part.load_seconds:.2f} s"
    yield f"{part.name}: {count}{timing}"
    yield f"  folder      {part.folder}"
    yield f"  licence     {part.licence}"
    yield "  stored as   " + (", ".join(f"{dtype} {_size(size)}" for dtype, size in part.stored.items()) or "?")
    yield f"  files       {len(part.files)}, {_size(sum(part.files.values()))}"
    yield from (f"              {name} {_size(size)}" for name, size in part.files.items())
    yield "  dimensions  " + (", ".join(_flat(part.dimensions)) or "?")


def _flat(dimensions: dict[str, object]) -> Iterator[str]:
    for name, value in dimensions.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield f"{name} {value}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
