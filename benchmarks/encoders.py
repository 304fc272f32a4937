"""Both encoders over the segments of several turns: in one evaluation, and one after another.

    python -m benchmarks.encoders [--model DIR] [--segments 1 8] [--seconds 5] [--repeats 5]

Without --model two encoders of 29 M and 27 M random parameters, made on the spot. Prints JSON: milliseconds that the
computing thread took for all segments together, both ways in turns (the median), and their ratio; how the engine that
the service uses on this device does it; whether the numbers are the same bit by bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimia.model.audio import Segment
from kimia.model.checkpoint import open_checkpoint
from kimia.model.config import EncoderConfig, FeatureConfig, LMConfig, VQConfig
from kimia.model.encode import SEGMENTS_AT_ONCE, AudioEncoder
from kimia.model.vq import VQTokenizer
from kimia.model.whisper import WhisperFeatures

WIDTH, LAYERS = 512, 8


def random_encoder() -> AudioEncoder:
    """Encoders bound by their weights; the shapes of a segment are those of the release."""
    features = FeatureConfig(sample_rate=16000, n_fft=400, hop=160, mel_bins=128, segment_samples=480_000)
    config = EncoderConfig(WIDTH, LAYERS, WIDTH // 64, 4 * WIDTH, 128, 1500, "gelu", scale_embedding=False)
    vq = VQConfig(config, 4, "avg", LAYERS, LAYERS, 4096, 200, causal_convolution=True, causal_attention=False)
    encoder = AudioEncoder(VQTokenizer(vq, features), WhisperFeatures(config, features, 4))
    generator = torch.Generator().manual_seed(0)
    for module in (encoder.vq, encoder.whisper):
        module.to_empty(device="cpu").eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return encoder


def loaded(model: str, device: str) -> AudioEncoder:
    """The encoders of a checkpoint, in float32."""
    found = open_checkpoint(model, None, detokenizer=False)
    width = LMConfig.read(found.root / "config.json").adaptor_input_dim
    return AudioEncoder.load(found, width, device, torch.float32)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds: of this thread's computing on a CPU, of the clock on a GPU."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - begin)


@torch.inference_mode()
def compared(encoder: AudioEncoder, batch: Sequence[Segment], repeats: int) -> dict[str, Any]:
    """The same segments together and one after another."""
    together, alone = [], []
    for _ in range(repeats + 1):
        together.append(timed(lambda: encoder.encode_segments(batch), encoder.device))
        alone.append(timed(lambda: [encoder.encode_segments([segment]) for segment in batch], encoder.device))
    pairs = zip(encoder.encode_segments(batch), (encoder.encode_segments([s])[0] for s in batch), strict=True)
    same = all(a.codes == b.codes and torch.equal(a.features, b.features) for a, b in pairs)
    one, other = statistics.median(together[1:]), statistics.median(alone[1:])  # the first one warms up
    return {
        "segments": len(batch),
        "together_ms": round(one, 1),
        "one_by_one_ms": round(other, 1),
        "one_by_one / together": round(other / one, 2),
        "bit_equal": same,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Segments of several turns together and one by one, as JSON.")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint (random encoders, made on the spot)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--segments", nargs="+", type=int, default=[1, 8], metavar="N", help="(1 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of sound in a segment (5)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    args = parse()
    torch.set_num_threads(1)
    encoder = loaded(args.model, args.device) if args.model else random_encoder()
    noise = np.random.default_rng(0)
    waves = [noise.normal(0, 0.1, round(args.seconds * 16000)).astype(np.float32) for _ in range(max(args.segments))]
    batch = [Segment(wave, whole=True) for wave in waves]
    report = {
        "model": Path(args.model).name if args.model else f"random, {WIDTH} wide, {LAYERS} layers",
        "device": str(encoder.device),
        "at_once_in_the_service": SEGMENTS_AT_ONCE[encoder.device.type],
        "measured": [compared(encoder, batch[:count], args.repeats) for count in args.segments],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
