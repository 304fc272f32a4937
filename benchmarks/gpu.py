"""The whole model on one GPU with random weights of the released sizes: what each part takes, beside its floor.

    benchmarks/gpu.sh [OUT]           # or: python -m benchmarks.gpu --out gpu.json [--preset 7b|tiny] [--seconds 480]

Parts, each written to OUT as soon as it is there; a call leaves out what OUT holds and begins nothing behind its time
(exit code 3: call again). `kimia plan --measured OUT` plans with it.

encode      both encoders over one segment of 30 s, and over 8 in one evaluation
prefill     ms per 1,000 positions
decode      ms per step at 1 to 512 rows behind CONTEXT positions, drawing included; `aim`: at most 1.3 floors
            at one row; `within_80_ms` is how many rows keep up with speech
decode_int8, decode_fp8   the same with quantised weights (torchao), beside the floor of the unquantised ones; `skipped`
            says why one of them cannot be had
speak       ms per steady flow chunk of each of 1, 8, 32 turns solved together, and its vocoding; `aim`: 1.5 floors
pipeline    callers who all ask at once and hear their answers in real time: TTFA, underrun; `aim`: p50 of 150 ms at 1,
            300 ms at 16, no underrun; `step`: ms between two steps of an answer, which flow solves may delay
streams     the same with the streams of a co-located host: the language model's is the most urgent
            (processes apart: python -m benchmarks.colocated --model DIR)
load        seconds to write the checkpoint to DIR, to load all of it

Floors are those of the cost model at the data sheet's rates of --gpu (default: by the device's name).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.engine import SAMPLING, endless, prompt_of
from benchmarks.player import Player
from benchmarks.regress import Chunks
from kimia.compute import ComputeThread, own_stream
from kimia.errors import ParameterError
from kimia.model.audio import Segment
from kimia.model.bigvgan import BigVGAN
from kimia.model.capacity import COMMITTED, SEGMENT_SECONDS, STEADY, Floors
from kimia.model.checkpoint import open_checkpoint
from kimia.model.checkpoint_presets import PRESETS, text_files
from kimia.model.config import exact_div
from kimia.model.detokenize import UPSAMPLE, Detokenizer
from kimia.model.dit import DiT
from kimia.model.encode import AudioEncoder
from kimia.model.engine import Engine
from kimia.model.generate import GenerateOptions
from kimia.model.gpus import GPU, GPUS, find_gpu
from kimia.model.lm import DualTrackLM
from kimia.model.quantize import Scheme, check_scheme, quantize, weight_bytes
from kimia.model.random_weights import new_checkpoint, preset_configs
from kimia.model.text import TextTokenizer
from kimia.model.vq import VQTokenizer
from kimia.model.whisper import WhisperFeatures
from kimia.pipeline import KimiAudio
from kimia.runtime.local import run_route
from kimia.stage import STAGES, Stage
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message, TrackSampling, TurnOptions
from kimia.v1.turn_pb2 import Chunk, InputAudio, Turn
from services.detokenizer.stage import DetokenizerStage
from services.llm.stage import LanguageModelStage
from services.tokenizer.stage import TokenizerStage

CONTEXT = 256  # positions behind which a step is measured
MORE = 3  # exit code: call again
STEP_SECONDS = 0.08  # of speech in one step


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: tuple[int, ...]
    chunks: tuple[int, ...]
    callers: tuple[int, ...]
    prompt: int
    repeats: int
    steps: int  # of one caller's answer


SIZES = {
    "7b": Size((1, 8, 64, 256, 512), (1, 8, 32), (1, 4, 16, 64), 4000, 20, 120),
    "tiny": Size((1, 2), (1,), (1,), 64, 1, 17),
}


# ---- random weights on the device -------------------------------------------------------------------------------


def synthesised(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A module filled with noise: what it computes costs the same."""
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.normal_(0, 0.02, generator=generator)
    return module


class Parts:
    """Every network of a preset, made when it is first asked for."""

    def __init__(self, preset: str, device: torch.device) -> None:
        self.preset, self.device = preset, device
        self.size = SIZES[preset]
        self.configs = preset_configs(PRESETS[preset])
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @cached_property
    def encoder(self) -> AudioEncoder:
        """VQ tokenizer in float32, Whisper in `dtype`."""
        configs = self.configs
        group = exact_div(configs.lm.adaptor_input_dim, configs.whisper.d_model, "features / frames")
        vq = self._filled(VQTokenizer(configs.vq, configs.vq_features), torch.float32)
        whisper = WhisperFeatures(configs.whisper, configs.whisper_features, group)
        whisper.encoder = self._filled(whisper.encoder, self.dtype)
        return AudioEncoder(vq, whisper)

    def _filled(self, module: nn.Module, dtype: torch.dtype) -> Any:
        return synthesised(lambda: module, self.device, dtype)

    @cached_property
    def lm(self) -> DualTrackLM:
        """The language model. Only legal codes have a logit in the audio track, so that something is said."""
        config, flow = self.configs.lm, self.configs.flow
        assert flow is not None
        lm: DualTrackLM = synthesised(lambda: DualTrackLM(config), self.device, self.dtype)
        lm.mimo_output.weight[: config.token_offset] = 0
        lm.mimo_output.weight[config.token_offset + flow.audio_codes :] = 0
        return lm

    def quantized(self, scheme: Scheme) -> DualTrackLM:
        """Another language model, its matrices in one byte a weight."""
        config = self.configs.lm
        lm: DualTrackLM = synthesised(lambda: DualTrackLM(config), self.device, self.dtype)
        quantize(lm, scheme)
        return lm

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Flow model in `dtype`, vocoder in float32."""
        flow, vocoder = self.configs.flow, self.configs.vocoder
        assert flow is not None
        assert vocoder is not None
        dit = synthesised(lambda: DiT(flow), self.device, self.dtype)
        return Detokenizer(dit, synthesised(lambda: BigVGAN(vocoder), self.device, torch.float32))

    def stages(self, rows: int, *, shared: bool = False) -> dict[str, Stage]:
        """The three of one process that has the whole GPU; `shared`: each with a stream of its own."""

        def thread(*, urgent: bool = False) -> ComputeThread:
            return ComputeThread(stream=own_stream(self.device, urgent=urgent) if shared else None)

        with tempfile.TemporaryDirectory() as folder:
            for path, content in text_files(PRESETS[self.preset]).items():
                (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / path).write_text(content, encoding="utf-8")
            tokenizer = TextTokenizer.load(Path(folder), self.configs.lm)
        return {
            "tokenizer": TokenizerStage(self.encoder, thread()),
            "llm": LanguageModelStage(self.lm, tokenizer, thread(urgent=True), rows),
            "detokenizer": DetokenizerStage(self.detokenizer, thread(), ComputeThread()),
        }


# ---- parts ------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median of calls, after one that pays for what happens once."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def beside(found: float, floor_seconds: float, aim: float | None = None) -> dict[str, Any]:
    """A time with its floor."""
    entry = {"ms": round(found, 3), "floor_ms": round(1e3 * floor_seconds, 3), "floors": found / (1e3 * floor_seconds)}
    return entry | ({} if aim is None else {"aim": aim, "reached": entry["floors"] <= aim})


def encode(parts: Parts, floors: Floors) -> dict[str, Any]:
    """One segment, and eight."""
    features = parts.configs.whisper_features
    noise = np.random.default_rng(0).normal(0, 0.1, features.segment_samples).astype(np.float32)
    segment = Segment(noise, whole=True)

    def times(count: int) -> float:
        return milliseconds(lambda: parts.encoder.encode_segments([segment] * count), parts.size.repeats, parts.device)

    return beside(times(1), floors.encode(SEGMENT_SECONDS)) | {"ms_of_8": round(times(8), 3)}


def prefill(parts: Parts, floors: Floors) -> dict[str, Any]:
    """A whole prompt, piece by piece."""
    engine, length = Engine(parts.lm, 1), parts.size.prompt
    options = GenerateOptions("both", 8, SAMPLING)

    def read() -> None:
        answer = engine.begin(prompt_of(length), endless(parts.lm.config), options)
        while answer.waits_for_prefill:
            engine.prefill(answer)

    found = milliseconds(read, min(3, parts.size.repeats), parts.device)
    return beside(found, floors.prefill(length)) | {
        "positions": length,
        "ms_per_1000_positions": round(1e3 * found / length, 3),
    }


def decode(parts: Parts, floors: Floors, rows: int, lm: DualTrackLM | None = None) -> dict[str, Any]:
    """Steps of so many answers at once."""
    lm = lm or parts.lm
    engine, config, warm = Engine(lm, rows), lm.config, lm.config.audio_delay + 3
    options = GenerateOptions("both", warm + 2 * parts.size.repeats, SAMPLING)
    prompt = prompt_of(min(CONTEXT, config.max_positions // 4))
    answers = [engine.begin(prompt, endless(config), replace(options, seed=row)) for row in range(rows)]
    for answer in answers:
        while answer.waits_for_prefill:
            engine.prefill(answer)
    for _ in range(warm):
        engine.step(answers)
    found = milliseconds(lambda: engine.step(answers), parts.size.repeats, parts.device)
    entry = beside(found, floors.decode(rows, len(prompt.audio_ids)), 1.3 if rows == 1 else None)
    return entry | {"tokens_per_second": round(1e3 * rows / found), "within_80_ms": found <= 1e3 * STEP_SECONDS}


def decode_quantized(parts: Parts, floors: Floors, rows: int, scheme: Scheme) -> dict[str, Any]:
    """The same with quantised weights."""
    try:
        check_scheme(scheme, parts.device)
    except ParameterError as error:
        return {"skipped": str(error)}
    lm = parts.quantized(scheme)
    return decode(parts, floors, rows, lm) | {"weight_gigabytes": round(weight_bytes(lm) / 1e9, 3)}


@torch.inference_mode()
def speak(parts: Parts, floors: Floors, rows: int) -> dict[str, Any]:
    """Chunks of so many turns solved together; their sound one after the other, as the stage makes it."""
    detokenizer, config = parts.detokenizer, parts.detokenizer.dit.config
    chunks = Chunks(detokenizer.dit, STEADY.evaluations + 1)
    mel = torch.randn(1, config.mel_bins, COMMITTED * UPSAMPLE, device=parts.device)

    def sound() -> list[Tensor]:
        return [detokenizer.vocoder(mel) for _ in range(rows)]

    repeats = max(1, parts.size.repeats // 4)
    flow = milliseconds(lambda: chunks.engine(rows), repeats, parts.device)
    vocoder = milliseconds(sound, repeats, parts.device)
    return beside(flow + vocoder, floors.speak(rows), 1.5) | {
        "flow_ms": round(flow, 3),
        "vocoder_ms": round(vocoder, 3),
    }


# ---- the pipeline -----------------------------------------------------------------------------------------------


def question(seconds: float = 5.0) -> tuple[Message, Chunk]:
    """A turn's sound: noise at 16 kHz."""
    noise = np.random.default_rng(0).normal(0, 3000, int(16000 * seconds)).astype("<i2").tobytes()
    clip = Clip(format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000))
    return Message(role=ROLE_USER, audio=clip), Chunk(final=True, input=InputAudio(data=noise, clip_end=True))


@dataclass
class Heard:
    """What the caller of one turn heard."""

    first: float = float("inf")  # seconds from the end of the question to the first sound; inf: none
    player: Player = field(default_factory=Player)
    steps: list[float] = field(default_factory=list)  # when each came


async def call(stages: dict[str, Stage], seed: int, steps: int) -> Heard:
    """One turn."""
    message, sound = question()
    options = TurnOptions(max_new_tokens=steps, audio=TrackSampling(temperature=0.8, top_k=10))
    turn = Turn(messages=[message], seed=seed, options=options, route=[kind.number for kind in STAGES.values()])
    begin, heard = time.perf_counter(), Heard()
    async for kind, chunk in run_route(stages, turn, [sound]):
        now = time.perf_counter() - begin
        if kind.name == "llm":
            heard.steps.append(now)
        if kind.name == "detokenizer" and chunk.speech.pcm:
            heard.first = min(heard.first, now)
            heard.player.feed(now, len(chunk.speech.pcm) / 2 / chunk.speech.sample_rate)
    return heard


def pipeline(parts: Parts, callers: int, *, shared: bool = False) -> dict[str, Any]:
    """So many at once."""
    stages = parts.stages(max(parts.size.callers), shared=shared)

    async def calls() -> list[Heard]:
        for stage in stages.values():
            await stage.warm_up()
        return await asyncio.gather(*(call(stages, seed, parts.size.steps) for seed in range(callers)))

    heard = asyncio.run(calls())
    firsts = sorted(1e3 * one.first for one in heard)
    dry = [sum(wait.seconds for wait in one.player.dry) for one in heard]
    gaps = sorted(1e3 * (later - step) for one in heard for step, later in pairwise(one.steps))
    aim = {1: 150.0, 16: 300.0}.get(callers)
    entry = {
        "ttfa_p50_ms": round(statistics.median(firsts), 1),
        "ttfa_max_ms": round(firsts[-1], 1),
        "step_p50_ms": round(statistics.median(gaps), 2),
        "step_p99_ms": round(gaps[int(0.99 * len(gaps))], 2),
        "speech_seconds": round(sum(one.player.fed for one in heard), 2),
        "underrun_seconds": round(sum(dry), 3),
        "callers_with_underrun": sum(map(bool, dry)),
    }
    return entry | ({} if aim is None else {"aim_ms": aim, "reached": entry["ttfa_p50_ms"] <= aim and not sum(dry)})


def load(parts: Parts) -> dict[str, Any]:
    """From files to a model that answers. The files have just been written, so they come out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        checkpoint = open_checkpoint(new_checkpoint(Path(folder) / "model", parts.preset, progress=False))
        written = time.perf_counter()
        size = sum(path.stat().st_size for path in checkpoint.root.rglob("*") if path.is_file())
        KimiAudio(checkpoint.root, device=parts.device, dtype=parts.dtype)
        loaded = time.perf_counter()
    return {"gigabytes": size / 1e9, "write_seconds": written - begin, "load_seconds": loaded - written}


# ---- slices -----------------------------------------------------------------------------------------------------


def jobs(parts: Parts, floors: Floors) -> Iterator[tuple[tuple[str, ...], Callable[[], dict[str, Any]]]]:
    """Where each result stands in OUT, and how it is made; first what costs least and says most."""
    size = parts.size
    yield ("decode", "1"), lambda: decode(parts, floors, 1)
    yield ("speak", "1"), lambda: speak(parts, floors, 1)
    yield ("prefill",), lambda: prefill(parts, floors)
    yield ("encode",), lambda: encode(parts, floors)
    for rows in size.rows[1:]:
        yield ("decode", str(rows)), lambda rows=rows: decode(parts, floors, rows)  # type: ignore[misc]
    schemes: tuple[Scheme, ...] = ("int8", "fp8")
    for scheme, rows in itertools.product(schemes, size.rows):
        yield (
            (f"decode_{scheme}", str(rows)),
            lambda rows=rows, scheme=scheme: decode_quantized(parts, floors, rows, scheme),  # type: ignore[misc]
        )
    for rows in size.chunks[1:]:
        yield ("speak", str(rows)), lambda rows=rows: speak(parts, floors, rows)  # type: ignore[misc]
    for callers in size.callers:
        yield ("pipeline", str(callers)), lambda callers=callers: pipeline(parts, callers)  # type: ignore[misc]
        yield ("streams", str(callers)), lambda callers=callers: pipeline(parts, callers, shared=True)  # type: ignore[misc]
    yield ("load",), lambda: load(parts)


def holds(found: dict[str, Any], place: tuple[str, ...]) -> bool:
    for name in place:
        if name not in found:
            return False
        found = found[name]
    return True


def put(found: dict[str, Any], place: tuple[str, ...], result: dict[str, Any]) -> None:
    for name in place[:-1]:
        found = found.setdefault(name, {})
    found[place[-1]] = result


def guessed(device: torch.device) -> GPU:
    """The GPU by the name that its driver gives. Raises ParameterError for one that is not in the table."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else "h200"  # a dry run needs some floor
    fitting = [gpu for key, gpu in GPUS.items() if key in name.replace(" ", "-")]
    if not fitting:
        raise ParameterError(f"{name} is not in the table of kimia/model/gpus.py; name a similar one: --gpu")
    return max(fitting, key=lambda gpu: len(gpu.name))


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="OUT")
    parser.add_argument("--preset", choices=sorted(SIZES), default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", help="name in the table of kimia/model/gpus.py (default: by the device)")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which nothing more is begun")
    args = parser.parse_args(arguments)
    end, device = time.monotonic() + args.seconds, torch.device(args.device)
    if args.preset == "7b" and device.type != "cuda":
        raise SystemExit("the released sizes need a CUDA device; a dry run on a CPU: --preset tiny")
    gpu = find_gpu(args.gpu) if args.gpu else guessed(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: a dry run"
    about = {"device": name, "preset": args.preset, "torch": torch.__version__, "floors_of": gpu.name}
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else about
    if {key: found.get(key) for key in about} != about:
        raise SystemExit(f"{args.out} was measured elsewhere or otherwise; name another file")
    parts = Parts(args.preset, device)
    for place, measure in jobs(parts, Floors(parts.configs, gpu, 1.0)):
        if holds(found, place):
            continue
        if time.monotonic() > end:
            return MORE
        result = measure()
        put(found, place, result)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(".".join(place), json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
