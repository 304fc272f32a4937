"""Arguments that several commands share: which model, which device, which conversation, how to sample."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia.errors import ConversationError, ParameterError

if TYPE_CHECKING:
    from kimia.pipeline import KimiAudio

DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("int8", "fp8")  # those of kimia.model.quantize, which needs torch
SAMPLING = {  # upstream's names, so that settings can be copied from its scripts
    "text_temperature": (float, 0.0, "0 takes the best token"),
    "text_top_k": (int, 5, "candidates; 0 takes all"),
    "text_repetition_penalty": (float, 1.0, "above 1 discourages repeats"),
    "text_repetition_window_size": (int, 16, "tokens that count as repeated"),
    "audio_temperature": (float, 0.0, "0 takes the best token; 0.8 is usual for speech"),
    "audio_top_k": (int, 5, "candidates; 0 takes all"),
    "audio_repetition_penalty": (float, 1.0, "above 1 discourages repeats"),
    "audio_repetition_window_size": (int, 64, "tokens that count as repeated"),
}


def add_model(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """--model, --vq-tokenizer and, where something is computed, --device and --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=os.environ.get("KIMIA_MODEL"),
        help="model folder in the released layout, or a hub id (default: $KIMIA_MODEL)",
    )
    group.add_argument(
        "--vq-tokenizer", help="folder or hub id of glm-4-voice-tokenizer, if not in or beside the model"
    )
    if device:
        group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one, else cpu)")
        group.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """--quantize, where a language model is loaded."""
    parser.add_argument(
        "--quantize",
        choices=SCHEMES,
        help="weights of the language model's matrices in one byte (default: as --dtype says); `kimia verify MODEL "
        "--quantize` measures what it costs",
    )


def model_location(args: argparse.Namespace) -> str:
    """The model that was named. Raises ParameterError when none was."""
    if not args.model:
        raise ParameterError(
            "no model: name a folder or hub id by --model or KIMIA_MODEL "
            "(to try things out: kimia checkpoint new --preset tiny model)"
        )
    return str(args.model)


def _text_message(text: str) -> dict[str, str]:
    return {"role": "user", "message_type": "text", "content": text}


def _audio_message(file: str) -> dict[str, str]:
    return {"role": "user", "message_type": "audio", "content": file}


def add_chat(parser: argparse.ArgumentParser) -> None:
    """CHAT.json, or --text and --audio."""
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "chat", nargs="?", type=Path, metavar="CHAT.json", help="list of messages; audio paths are relative to the file"
    )
    # Both options append to one list, so the messages keep the order of the command line.
    said: Any = {"dest": "said", "action": "append"}
    group.add_argument("--text", type=_text_message, metavar="TEXT", help="a user message of text", **said)
    group.add_argument("--audio", type=_audio_message, metavar="FILE", help="a user message of audio", **said)
    group.add_argument(
        "--output", choices=("text", "both"), default="both", help="text, or both text and speech (default)"
    )


def chat_messages(args: argparse.Namespace) -> list[Any]:
    """The conversation that was given. Raises ParameterError when there is none or it cannot be read."""
    if args.chat is not None and args.said:
        raise ParameterError("give either CHAT.json or --text and --audio, not both")
    if args.chat is not None:
        return read_chat(args.chat)
    if not args.said:
        raise ParameterError("nothing to answer: give CHAT.json, --text TEXT or --audio FILE")
    return list(args.said)


def read_chat(path: Path) -> list[Any]:
    """Messages of a JSON file, their audio paths made relative to its folder."""
    try:
        chat = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8, or nested without end
        raise ParameterError(f"{path}: is not JSON ({error})") from error
    if not isinstance(chat, list):
        raise ConversationError(f"{path} must hold a list of messages, not a {type(chat).__name__}")
    return [_located(message, path.parent) for message in chat]


def _located(message: Any, folder: Path) -> Any:
    """The message with its audio path below `folder`; what is irregular is left to the conversation's own check."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str) and message.get("message_type") == "audio":
        return message | {"content": str(folder / content)}
    if isinstance(content, list) and content and isinstance(content[0], str):
        return message | {"content": [str(folder / content[0]), *content[1:]]}
    return message


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Upstream's sampling settings, --max-new-tokens and --seed."""
    group = parser.add_argument_group("sampling")
    for name, (kind, default, meaning) in SAMPLING.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=default, metavar="X", help=f"{meaning} (default {default})")
    group.add_argument("--max-new-tokens", type=int, default=-1, metavar="N", help="steps of 80 ms (default: no limit)")
    group.add_argument("--seed", type=int, help="repeats an answer exactly (default: drawn and printed)")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of KimiAudio.generate."""
    return {name: getattr(args, name) for name in (*SAMPLING, "max_new_tokens", "seed")}


def load_model(args: argparse.Namespace, *, load_detokenizer: bool, text_only: bool) -> KimiAudio:
    """Load the model that was named, saying on stderr what is being done and whether its weights are random."""
    location = model_location(args)
    print(f"loading {location} ...", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        import torch

        from kimia.pipeline import KimiAudio

        model = KimiAudio(
            location,
            load_detokenizer,
            text_only=text_only,
            vq_tokenizer=args.vq_tokenizer,
            device=args.device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            quantize=args.quantize,
        )
    finally:
        print(file=sys.stderr)
    print(f"[ready in {time.perf_counter() - started:.1f} s on {model.device}, {model.dtype}]", file=sys.stderr)
    if model.config.random_weights:
        print("[random weights: the text is gibberish and the sound is noise]", file=sys.stderr)
    return model
