"""The second turn of a conversation, with the KV of the first one kept and without: time to its first text.

    python -m benchmarks.prefix [--model DIR] [--positions 1000] [--repeats 5]

Without --model a model of 230 M random parameters, made on the spot. The first turn's prompt has its positions less
those of the answer; a third of them is a caller's sound with continuous features. Then the answer is read ahead in the
layout of the history, and the caller asks again. Both second turns are computed in turns in one process, the first text
is drawn in the first step. Prints JSON: milliseconds that the thread computed (`time.thread_time`: on a shared machine
the wall clock measures the neighbours), median, what was reused, and what idle time was spent on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import RANDOM, SAMPLING, endless, prompt_of, random_lm, timed
from kimia.model.engine import Answer, Engine, context_bytes
from kimia.model.generate import GenerateOptions
from kimia.model.lm import DualTrackLM, Row, load_lm
from kimia.model.prefix import Prefixes

ANSWER, QUESTION = 130, 60  # positions: ten seconds of speech, a short question


class Conversation:
    """Two turns, the second one's history of so many positions."""

    def __init__(self, lm: DualTrackLM, positions: int) -> None:
        self.engine = Engine(lm, 1, Prefixes(4 * context_bytes(lm)))
        self.tokens = endless(lm.config)
        self.options = GenerateOptions("both", 2, SAMPLING)
        self.history = positions
        ids = prompt_of(positions + QUESTION)
        heard = (10, (positions - ANSWER) // 3)
        features = torch.randn(heard[1], lm.config.adaptor_input_dim, generator=torch.Generator().manual_seed(1))
        self.second = Row(ids.audio_ids, ids.text_ids, [heard], [features])

    def prompt(self, begin: int, end: int) -> Row:
        """Positions of the conversation; the sound lies in the first turn."""
        row = self.second
        ids = row.audio_ids[begin:end], row.text_ids[begin:end]
        return Row(*ids, row.segments, row.features) if begin == 0 else Row(*ids)

    def begin(self, prompt: Row, conversation: str) -> Answer:
        """A turn up to its first text."""
        answer = self.engine.begin(prompt, self.tokens, self.options, conversation)
        while answer.waits_for_prefill:
            self.engine.prefill(answer)
        self.engine.step([answer])
        return answer

    def between(self) -> float:
        """The first turn and what follows it; milliseconds of idle time."""
        first = self.history - ANSWER
        self.engine.keep(self.begin(self.prompt(0, first), "call"), self.prompt(first, self.history))

        def ahead() -> None:
            while self.engine.read_ahead("call"):
                pass

        return timed(ahead)

    def again(self) -> None:
        """Let the history, and no more, be what is kept, as it was before the second turn."""
        prefix = self.engine.prefixes.get("call")
        assert prefix is not None
        prefix.cut(self.history // self.engine.piece, self.engine.piece)


def report(lm: DualTrackLM, positions: int, repeats: int) -> dict[str, Any]:
    """Both second turns, in turns."""
    conversation = Conversation(lm, positions)
    idle = conversation.between()
    kept = conversation.engine.prefixes.nbytes
    times: dict[str, list[float]] = {"call": [], "": []}
    reused = []
    for _ in range(repeats):
        for name, found in times.items():
            answers: list[Answer] = []
            found.append(
                timed(lambda name=name, answers=answers: answers.append(conversation.begin(conversation.second, name)))
            )  # type: ignore[misc]
            if name:
                reused.append(answers[0].reused)
                conversation.engine.keep(answers[0])
                conversation.again()
    with_reuse, without = (statistics.median(found) for found in times.values())
    return {
        "parameters": sum(parameter.numel() for parameter in lm.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "positions": len(conversation.second.audio_ids),
        "reused": min(reused),
        "first_text_ms": {"with_reuse": with_reuse, "without": without, "ratio": without / with_reuse},
        "idle_ms": idle,
        "kept_megabytes": kept / 1e6,
    }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="The second turn of a conversation with and without its KV, as JSON.")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: random weights of 230 M parameters)")
    parser.add_argument("--positions", type=int, default=1000, help="of the history")
    parser.add_argument("--repeats", type=int, default=5, help="second turns of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.float32
    lm = random_lm(RANDOM) if args.model is None else load_lm(args.model, device="cpu", dtype=dtype)
    print(json.dumps(report(lm, args.positions, args.repeats), indent=1))


if __name__ == "__main__":
    main()
