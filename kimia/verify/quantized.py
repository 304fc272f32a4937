"""What quantised weights cost in precision, against the same weights as they are (`kimia verify --quantize`).

The model as it is answers recordings; then both versions read each prompt and that answer (teacher forcing), and the
logits of the steps that draw something are compared, track by track. Nothing is judged: how much may be lost depends on
what the answers are for, and no threshold is known that would hold for every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia.model.conversation import parse_conversation
from kimia.model.generate import GenerateOptions, generate
from kimia.model.lm import DualTrackLM, Row, stack
from kimia.model.presets import LOW_LATENCY
from kimia.model.prompt import build_prompt
from kimia.model.quantize import check_scheme, quantize, weight_bytes
from kimia.model.sampler import Sampling
from kimia.pipeline import KimiAudio, answer_steps, encode_clips, load_clips, prompt_row

EXAMPLES = "examples/*.wav"  # of the checkpoint itself, where no recording is named
GREETINGS = ("Hello, who is speaking?", "What can you do for me?")  # where there is none of these
MOST_STEPS = 125  # of one answer: 10 s of speech
SAMPLING = Sampling.from_arguments({"audio_temperature": 0.8, "audio_top_k": 10})  # as the release is used


@dataclass(frozen=True)
class Forced:
    """A prompt with its answer, and at which of its positions each track is drawn."""

    row: Row
    text: slice
    audio: slice


@dataclass(frozen=True)
class TrackLoss:
    """One track over all the positions at which it is drawn: absolute errors of logits, KL divergence in nats."""

    track: str
    positions: int
    largest_error: float
    mean_error: float
    mean_divergence: float
    largest_divergence: float
    agreeing: int  # positions whose best token is the same

    def __str__(self) -> str:
        if not self.positions:
            return f"{self.track:<5}  never drawn"
        return (
            f"{self.track:<5}  logits: error at most {self.largest_error:.3g}, mean {self.mean_error:.3g}   "
            f"KL divergence: mean {self.mean_divergence:.3g}, at most {self.largest_divergence:.3g} nats   "
            f"greedy token the same at {self.agreeing} of {self.positions} positions "
            f"({self.agreeing / self.positions:.1%})"
        )


@dataclass(frozen=True)
class Loss:
    """What a scheme costs, and what it saves."""

    scheme: str
    source: str  # what was answered
    tracks: tuple[TrackLoss, TrackLoss]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        saved = f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({self.bytes_after / self.bytes_before:.1%})"
        first = f"{self.scheme} against the same weights as they are, over {self.source}"
        return "\n".join((first, *map(str, self.tracks), f"language model: {saved}"))


def measure(model: KimiAudio, scheme: str, recordings: Sequence[Path] = (), examples: Path | None = None) -> Loss:
    """Compare, and leave the model quantised.

    Without recordings those in the folder `examples`'s own `EXAMPLES` are answered, without these two greetings.
    Raises ParameterError as `check_scheme` does, AudioError, ConversationError.
    """
    chosen = check_scheme(scheme, model.device)
    assert chosen is not None
    files = [*recordings] or sorted(examples.glob(EXAMPLES) if examples is not None else ())
    chats = [[_message("audio", str(file))] for file in files] or [[_message("text", text)] for text in GREETINGS]
    answers = [_answered(model, chat) for chat in chats]
    before, size = [_logits(model.lm, answer) for answer in answers], weight_bytes(model.lm)
    quantize(model.lm, chosen)
    after = [_logits(model.lm, answer) for answer in answers]
    tracks = [
        _compared(name, [each[track] for each in before], [each[track] for each in after])
        for track, name in enumerate(("text", "audio"))
    ]
    source = f"answers to {', '.join(file.name for file in files) or 'two greetings'}"
    return Loss(chosen, source, (tracks[0], tracks[1]), size, weight_bytes(model.lm))


def _message(kind: str, content: str) -> dict[str, str]:
    return {"role": "user", "message_type": kind, "content": content}


def _answered(model: KimiAudio, chat: Sequence[dict[str, str]]) -> Forced:
    """A conversation with the answer that the model gives it."""
    messages = parse_conversation(chat, model.config)
    clips = encode_clips(messages, load_clips(messages, model.encoder.sample_rate), model.encoder)
    prompt = build_prompt(messages, clips, "both", model.config, model.tokenizer)
    most = answer_steps(prompt, "both", MOST_STEPS, model.config, LOW_LATENCY)
    row, tokens = prompt_row(prompt), model.track_tokens
    steps = list(generate(model.lm, row, tokens, GenerateOptions("both", most, SAMPLING)))
    text_ids, audio_ids = [step.text_id for step in steps], [step.audio_id for step in steps]
    whole = Row(
        (*row.audio_ids, *audio_ids[:-1]), (*row.text_ids, *text_ids[:-1]), row.segments, row.features
    )  # the last ids decide nothing
    first = len(row.audio_ids) - 1  # its logits draw step 0
    drawn = text_ids.index(tokens.text_eos) + 1 if tokens.text_eos in text_ids else len(steps)
    return Forced(whole, slice(first, first + drawn), slice(first + tokens.delay, None))


@torch.inference_mode()
def _logits(lm: DualTrackLM, forced: Forced) -> tuple[Tensor, Tensor]:
    """Of the positions at which something is drawn, (n, V) of each track."""
    found = lm(stack([forced.row], lm.device))
    text, audio = found.text_logits[0, forced.text], found.audio_logits[0, forced.audio]
    return text.float().cpu(), audio.float().cpu()


def _compared(track: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> TrackLoss:
    exact, near = torch.cat(list(before)), torch.cat(list(after))
    if not len(exact):
        return TrackLoss(track, 0, 0.0, 0.0, 0.0, 0.0, 0)
    error = (near - exact).abs()
    divergence = F.kl_div(near.log_softmax(-1), exact.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return TrackLoss(
        track,
        len(exact),
        float(error.max()),
        float(error.mean()),
        float(divergence.mean()),
        float(divergence.max()),
        int((near.argmax(-1) == exact.argmax(-1)).sum()),
    )
