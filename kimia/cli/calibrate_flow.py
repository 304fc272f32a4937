"""`kimia calibrate-flow`: find the cheapest preset that still sounds alike, on one's own weights and audio."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia.cli.draw import check_format
from kimia.cli.service import check_writable
from kimia.errors import AudioError, ParameterError
from kimia.model.preset_file import FOLDER, PRESET_SUFFIX

if TYPE_CHECKING:
    import numpy as np

    from kimia.model.calibrate import Calibration, Measured

    Recognise = Callable[[np.ndarray, int], str]  # (S,) at so many Hz -> what is said

REPORTS = "reports"  # beside the presets
HEARING_RATE = 16_000  # Hz, of the recogniser
TITLES = {
    "grid": "grids: cuts of low-latency, against 29 even steps",
    "cuts": "look-ahead and chunks: the grid above, against the release's",
}
EPILOG = """\
examples:
  kimia calibrate-flow DIR call1.wav call2.wav
  kimia up --model DIR --preset calibrated
  kimia calibrate-flow DIR *.wav --name quick --steps 4,6,8 --limit 1.5 --recognizer small

The audio becomes codes by the checkpoint's tokenizer; ten to thirty seconds of the voices in question are enough.
Each candidate speaks them from the same noise, and is compared with the release's 29 even steps: first grids (numbers
of steps, spacings), then look-aheads and chunk sizes. What is taken is the cheapest grid within --limit (where none
is, the nearest, and that is said), then the cheapest cuts that are no farther from the release's than those of
low-latency. The preset is written with what was measured to DIR/presets/NAME.json, all candidates and their picture
to DIR/presets/reports.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR", help="model folder in the released layout")
    parser.add_argument("audio", nargs="+", metavar="FILE", help="speech to calibrate on: WAV, FLAC, OGG or MP3")
    parser.add_argument("--vq-tokenizer", help="folder of glm-4-voice-tokenizer, if not in or beside the model")
    parser.add_argument("--name", default="calibrated", help="of the preset (default: calibrated)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: DIR/presets)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, float32 on cpu")
    group = parser.add_argument_group("what is tried")
    group.add_argument("--limit", type=float, default=1.0, metavar="dB", help="distance that a grid may have (1)")
    group.add_argument("--steps", type=_list(int), metavar="N,...", help="evaluations a chunk (6,8,10,12,16,20)")
    group.add_argument(
        "--spacings",
        type=_list(float),
        metavar="S,...",
        help="0: even; -1..0: closer together at the noise; 0..1.75: at the mel (0,-0.5,-1,0.5; begin with 0)",
    )
    group.add_argument("--look-aheads", type=_list(int), metavar="N,...", help="tokens (2,4,8)")
    group.add_argument(
        "--chunks",
        type=_list(int, "+"),
        action="append",
        metavar="N+N+...",
        help="tokens that pushes commit, the last repeats; may be given again (6+12+24+37, 6+18+37, 6+12+24+48)",
    )
    group.add_argument(
        "--recognizer", metavar="NAME", help="also measure spoken word errors with this model of faster-whisper"
    )


def _list(kind: Callable[[str], Any], separator: str = ",") -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(separator))

    values.__name__ = "list"  # for argparse's message
    return values


def run(args: argparse.Namespace) -> int:
    """Search, show, write."""
    recognise = recognizer(args.recognizer) if args.recognizer else None
    work = _prepared(args)
    folder = _place(args)
    found = _searched(work.calibration)
    chosen, candidates = found[-1], found[:-1]
    print("\n".join([*table(candidates, chosen), *beyond(candidates, work.calibration.space.limit)]))
    report = {
        "model": args.model,
        "audio": args.audio,
        "seconds": round(sum(len(wave) for wave in work.waves) / work.rate, 2),
        "limit_db": work.calibration.space.limit,
        "release_tflop_per_second": work.released,
        "chosen": _row(chosen),
        "candidates": [_row(one) for one in candidates],
    }
    if recognise:
        report["spoken_word_errors"] = errors = work.word_errors(chosen, recognise)
        print("word errors: " + ", ".join(f"{way} {rate:.1%}" for way, rate in errors.items()))
    file, reports = folder / f"{args.name}{PRESET_SUFFIX}", folder / REPORTS
    chosen.file.write(file, measured={name: value for name, value in report.items() if name != "candidates"})
    (reports / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _draw(candidates, chosen, report, reports / f"{args.name}.svg")
    print(f"written: {file}; all candidates: {reports}")
    print(f"  kimia up --model {args.model} --preset {args.name if folder.name == FOLDER else file}")
    return 0


# ---- the search -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A search, and the clips that it speaks."""

    calibration: Calibration
    waves: Sequence[np.ndarray]  # the audio itself
    rate: int  # its, Hz
    released: dict[str, float]  # what the release's cuts and steps cost at this model's size

    def word_errors(self, chosen: Measured, recognise: Recognise) -> dict[str, float]:
        """Shares of wrong words against what the recogniser hears in the audio itself."""
        from kimia.model.calibrate import word_errors
        from kimia.model.presets import UPSTREAM, preset_of

        said = [recognise(wave, self.rate) for wave in self.waves]
        rates = {}
        for way, preset in (("29 steps", UPSTREAM), ("chosen", preset_of(chosen.file))):
            spoken = [wave.numpy() for wave in self.calibration.speak(preset)]
            heard = [recognise(wave, self.calibration.sample_rate) for wave in spoken]
            counts = [word_errors(*pair) for pair in zip(said, heard, strict=True)]
            words = sum(count for _, count in counts)
            if not words:
                raise AudioError("the recogniser hears no word in the audio; give recordings of speech")
            rates[way] = sum(errors for errors, _ in counts) / words
        return rates


def _prepared(args: argparse.Namespace) -> Work:
    """Everything is checked before anything is searched."""
    import torch

    from kimia.model.audio import load_audio
    from kimia.model.calibrate import Calibration, Space
    from kimia.model.checkpoint import open_checkpoint
    from kimia.model.cost import flow_second
    from kimia.model.detokenize import Detokenizer
    from kimia.model.presets import UPSTREAM
    from kimia.model.vq import load_vq
    from kimia.pipeline import choose_device, choose_dtype

    given = {
        "steps": args.steps,
        "sways": args.spacings,
        "look_aheads": args.look_aheads,
        "growths": tuple(args.chunks) if args.chunks else None,
    }
    space = Space(limit=args.limit, **{name: value for name, value in given.items() if value is not None})
    device = choose_device(args.device)
    dtype = choose_dtype(getattr(torch, args.dtype) if args.dtype else None, device)
    checkpoint = open_checkpoint(args.model, args.vq_tokenizer, detokenizer=True)
    vq = load_vq(checkpoint.vq_tokenizer, device)
    rate = vq.features.sample_rate
    waves = [load_audio(file, rate) for file in args.audio]
    codes = [clip.tolist() for clip in vq.encode(waves)]
    detokenizer = Detokenizer.load(checkpoint, device, dtype)
    config = detokenizer.dit.config
    released = {
        "modulation of every frame": flow_second(config, UPSTREAM, 1, 1).flop / 1e12,
        "modulation of every token": flow_second(config, UPSTREAM, 1).flop / 1e12,
    }
    return Work(Calibration(detokenizer, codes, space, args.name), waves, rate, released)


def _place(args: argparse.Namespace) -> Path:
    """The folder of the preset, made before the search: what it finds after hours must not be lost for want of one."""
    folder: Path = args.out or Path(args.model) / FOLDER
    try:
        (folder / REPORTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"{folder}: cannot be made ({error.strerror}); name another by --out") from error
    for file in (folder / f"{args.name}{PRESET_SUFFIX}", folder / REPORTS / f"{args.name}{PRESET_SUFFIX}"):
        check_writable(file)
    return folder


def _searched(calibration: Calibration) -> list[Measured]:
    """All candidates, and the chosen one at the end."""
    from tqdm import tqdm

    found = []
    with tqdm(total=calibration.runs, desc="candidates", file=sys.stderr) as progress:
        for one in calibration.search():
            if one is not None:
                found.append(one)
            progress.update(int(progress.n < calibration.runs))
    return found


def recognizer(name: str) -> Recognise:
    """faster-whisper's model of this name or folder. Raises ParameterError when it cannot be had."""
    if importlib.util.find_spec("faster_whisper") is None:
        raise ParameterError("--recognizer needs faster-whisper: pip install faster-whisper, or leave it out")
    import soxr
    from faster_whisper import WhisperModel

    try:
        model = WhisperModel(name, device="cpu", compute_type="int8")
    except Exception as error:  # of several libraries
        raise ParameterError(f"--recognizer {name}: faster-whisper cannot load it ({error})") from error

    def recognise(wave: np.ndarray, rate: int) -> str:
        segments, _ = model.transcribe(soxr.resample(wave, rate, HEARING_RATE), beam_size=1, temperature=0.0)
        return " ".join(segment.text for segment in segments)

    return recognise


# ---- what is shown ----------------------------------------------------------------------------------------------


def table(candidates: Sequence[Measured], chosen: Measured) -> Iterator[str]:
    """The candidates, both parts of the search; a star where one was taken."""
    for part, title in TITLES.items():
        yield title
        yield f"  {'steps':>5} {'spacing':>7} {'look-ahead':>10}  {'chunks':<16} {'first':>5} {'TFLOP/s':>8} {'dB':>6}"
        for one in candidates:
            schedule = one.file.schedule
            if one.part == part:
                taken = "*" if one.file.times == chosen.file.times and (part == "grid" or one == chosen) else " "
                chunks = "+".join(map(str, schedule.commits))
                yield (
                    f"{taken} {one.steps:>5} {one.sway:>7g} {schedule.look_ahead:>10}  {chunks:<16} "
                    f"{one.first_codes:>5} {one.tflop:>8.3g} {one.distance:>6.2f}"
                )


def beyond(candidates: Sequence[Measured], limit: float) -> Iterator[str]:
    """A line where the grid that was taken is not as near as was asked for."""
    nearest = min(one.distance for one in candidates if one.part == "grid")
    if nearest > limit:
        yield f"no grid lies within {limit:g} dB: the nearest was taken, {nearest:.2f} dB; try more steps"


def _row(one: Measured) -> dict[str, Any]:
    return {
        "part": one.part,
        "steps": one.steps,
        "spacing": one.sway,
        "look_ahead": one.file.schedule.look_ahead,
        "chunks": one.file.schedule.commits,
        "first_audio_codes": one.first_codes,
        "tflop_per_second": one.tflop,
        "distance_db": round(one.distance, 4),
    }


def _draw(candidates: Sequence[Measured], chosen: Measured, report: Mapping[str, Any], path: Path) -> None:
    """Distance over cost; without matplotlib there is no picture."""
    try:
        check_format(path)
    except ParameterError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (part, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        shown = [one for one in candidates if one.part == part]
        for sway in sorted({one.sway for one in shown}):
            line = [one for one in shown if one.sway == sway]
            style = "o-" if part == "grid" else "o"
            axes.plot([one.tflop for one in line], [one.distance for one in line], style, label=f"spacing {sway:g}")
        if part == "grid":
            axes.axhline(report["limit_db"], color="gray", linestyle=":", label="limit")
        else:
            axes.plot(chosen.tflop, chosen.distance, "k*", markersize=14, label="chosen")
        axes.set(xlabel="TFLOP per second of audio", ylabel="log-spectral distance, dB", title=title)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(path)
