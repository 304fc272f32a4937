"""`kimia generate`: answer one conversation in text and speech."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia.cli.arguments import (
    add_chat,
    add_model,
    add_quantize,
    add_sampling,
    chat_messages,
    load_model,
    sampling_options,
)
from kimia.errors import ParameterError

if TYPE_CHECKING:
    import numpy as np

    from kimia.pipeline import KimiAudio, TurnDone

EPILOG = """examples:
  kimia generate --model DIR --audio question.wav --out answer.wav
  kimia generate --model DIR --text "Please transcribe:" --audio call.wav --output text
  kimia generate --model DIR chat.json --json --seed 7

chat.json holds a list of messages; audio paths are relative to it:
  [{"role": "user", "message_type": "audio", "content": "question.wav"},
   {"role": "assistant", "message_type": "audio-text", "content": ["answer.wav", "Gladly."]},
   {"role": "user", "message_type": "text", "content": "And in English?"}]
--json prints the answer with its ids: its "message" can be appended to the chat as it is.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia generate`."""
    parser.epilog = EPILOG
    add_chat(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.wav", help="write the spoken answer here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the spoken answer (.svg or .png)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument(
        "--preset",
        default="upstream",
        metavar="NAME|FILE",
        help="chunk schedule, cross-fade and length limit: upstream, as released (default), low-latency, made for "
        "short waiting, or one that `kimia calibrate-flow` wrote",
    )
    add_model(parser)
    add_quantize(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the conversation; the text goes to stdout, what is being done to stderr."""
    messages = chat_messages(args)
    speaks = args.output == "both"
    _check_files(args, speaks)
    _check_question_stays(args, messages)
    _check_turn(args, messages)
    model = load_model(args, load_detokenizer=speaks, text_only=not speaks)
    started = time.perf_counter()
    done, pcm = _answer(model, messages, args)
    seconds = time.perf_counter() - started
    if args.out:
        _write_wav(args.out, pcm, model.sample_rate)
    if args.plot:
        _draw(args.plot, model, done, pcm)
    if args.json:
        print(json.dumps(_report(done, pcm, model), ensure_ascii=False))
    _tell(done, len(pcm) / model.sample_rate if speaks else 0.0, seconds)
    return 0


def _check_files(args: argparse.Namespace, speaks: bool) -> None:
    """Refuse before the model is loaded what would fail after the answer was made."""
    for path in (args.out, args.plot):
        if path is None:
            continue
        if not speaks:
            raise ParameterError("--out and --plot need speech: leave out --output text")
        if not path.parent.is_dir():
            raise ParameterError(f"{path}: the folder {path.parent} does not exist")
        if path.exists() and not path.is_file():
            raise ParameterError(f"{path}: is not a file that can be written")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ParameterError(f"{path}: no permission to write there")
    if args.out and args.out.suffix.lower() != ".wav":
        raise ParameterError(f"{args.out}: speech is written as .wav")
    if args.plot:
        from kimia.cli.draw import check_format

        check_format(args.plot)


def _check_question_stays(args: argparse.Namespace, messages: list[Any]) -> None:
    """Refuse to write the answer over a sound file of the conversation."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    named = [item for content in contents for item in (content if isinstance(content, list) else [content])]
    for path in (args.out, args.plot):
        if path is not None and path.exists() and any(isinstance(n, str) and _same(Path(n), path) for n in named):
            raise ParameterError(f"{path}: is part of the conversation; write the answer elsewhere")


def _check_turn(args: argparse.Namespace, messages: list[Any]) -> None:
    """Refuse settings and sound that no turn can have. Raises ParameterError or AudioError."""
    from kimia.model.audio import MIN_RATE, load_audio
    from kimia.pipeline import check_options

    check_options(**sampling_options(args))
    for message in messages:
        match message:
            case {"message_type": "audio", "content": str(path)}:
                load_audio(path, MIN_RATE)
            case {"message_type": "audio-text", "content": [str(path), *_]} if "audio_tokens" not in message:
                load_audio(path, MIN_RATE)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # a text, not the name of a file
        return False


def _answer(model: KimiAudio, messages: list[Any], args: argparse.Namespace) -> tuple[TurnDone, np.ndarray]:
    """Stream the turn, printing text as it comes."""
    import numpy as np

    from kimia.pipeline import AudioChunk, TextDelta, TurnDone

    pieces = [np.zeros(0, np.float32)]
    for event in model.stream(messages, args.output, preset=args.preset, **sampling_options(args)):
        if isinstance(event, AudioChunk):
            pieces.append(event.pcm)
            _progress(sum(map(len, pieces)) / model.sample_rate)
        elif isinstance(event, TextDelta) and not args.json:
            print(event.text, end="", flush=True)
        elif isinstance(event, TurnDone):
            done = event
    if not args.json:
        print()
    return done, np.concatenate(pieces)


def _progress(seconds: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{seconds:6.1f} s of speech ", end="", file=sys.stderr, flush=True)


def _write_wav(path: Path, pcm: np.ndarray, rate: int) -> None:
    import soundfile

    try:
        soundfile.write(path, pcm, rate, subtype="PCM_16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise ParameterError(f"{path}: cannot be written ({error})") from error


def _draw(path: Path, model: KimiAudio, done: TurnDone, pcm: np.ndarray) -> None:
    import torch

    from kimia.cli.draw import AnswerPicture, draw_answer
    from kimia.model.bigvgan import mel_spectrogram
    from kimia.model.prompt import TOKEN_RATE

    if model.detokenizer is None or not len(pcm):
        raise ParameterError("there is no speech to draw: the answer has no audio codes")
    mel = mel_spectrogram(torch.from_numpy(pcm), model.detokenizer.vocoder.config)
    limit = model.tokenizer.size
    text = [
        (step, model.tokenizer.decode([token])) for step, token in enumerate(done.result.returned_text) if token < limit
    ]
    picture = AnswerPicture(
        title=f"{len(done.result.audio_codes)} semantic tokens, {len(pcm) / model.sample_rate:.2f} s of speech",
        pcm=pcm,
        sample_rate=model.sample_rate,
        mel=mel.numpy(),
        codes=done.result.audio_codes,
        text=text,
        delay=model.config.audio_delay,
        frame_rate=TOKEN_RATE,
    )
    draw_answer(picture, path)


def _report(done: TurnDone, pcm: np.ndarray, model: KimiAudio) -> dict[str, Any]:
    speech = {"audio_seconds": len(pcm) / model.sample_rate} if model.detokenizer else {}
    return {
        "text": done.text,
        "stop": done.stop,
        "seed": done.seed,
        "prompt_positions": done.prompt_positions,
        "steps": done.steps,
        **speech,
        "illegal_text_ids": done.result.illegal_text,
        "illegal_audio_ids": done.result.illegal_audio,
        "message": done.message(),
    }


def _tell(done: TurnDone, speech: float, seconds: float) -> None:
    spoken = f", {speech:.2f} s of speech" if speech else ""
    print(
        f"[{done.prompt_positions} positions in, {done.steps} steps out, stopped by {done.stop}{spoken}; "
        f"{seconds:.2f} s, seed {done.seed}]",
        file=sys.stderr,
    )
