"""What is left out when a conversation does not fit: its oldest turns as a whole, never the last one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kimia.errors import ContextLengthError, ConversationError
from kimia.model.conversation import Message, OutputType
from kimia.model.prompt import TOKEN_RATE, Prompt

ANSWER_SECONDS = 10  # of speech, or the text of as many steps: room for which old turns make way


@dataclass(frozen=True, eq=False)
class Fitted:
    """A prompt that leaves room for an answer."""

    prompt: Prompt
    steps: int  # that the answer may take
    dropped: int  # messages left out at the beginning


def answer_room(output_type: OutputType, delay: int, limit: int | None, say: int = 0) -> int:
    """Steps that an answer should have: ten seconds after the delay, but no more than the caller wants.

    `say` is the number of text ids to be said, which need a step each and one for their end.
    """
    speech = int(ANSWER_SECONDS * TOKEN_RATE) + (delay if output_type == "both" else 0)
    room = max(speech, say + 1)
    return room if limit is None else min(room, limit)


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where the conversation may begin: at its first message, and wherever the user speaks after the assistant."""
    later = (i for i in range(1, len(messages)) if messages[i].role == "user" and messages[i - 1].role == "assistant")
    return [0, *later]


def fit(starts: Sequence[int], lay_out: Callable[[int], Prompt], allowed: Callable[[Prompt], int], room: int) -> Fitted:
    """The longest end of the conversation that leaves `room`, or else its last turn.

    `lay_out` makes the prompt of the messages from a start on, `allowed` says the steps that it leaves. Raises
    ContextLengthError when not even the last turn leaves one.
    """

    def begun_at(start: int) -> Fitted:
        with numbered_from(start):
            prompt = lay_out(start)
            return Fitted(prompt, allowed(prompt), start)

    def roomy(start: int) -> Fitted | None:
        try:
            fitted = begun_at(start)
        except ContextLengthError:
            return None
        return fitted if fitted.steps >= room else None

    whole = roomy(starts[0]) if len(starts) > 1 else None
    if whole is not None:
        return whole
    last = len(starts) - 1
    first = bisect_left(starts, True, lo=min(1, last), hi=last, key=lambda start: roomy(start) is not None)
    return begun_at(starts[first])


@contextmanager
def numbered_from(start: int) -> Iterator[None]:
    """Let errors about messages count from the conversation's beginning, though `start` messages were left out."""
    try:
        yield
    except ConversationError as error:
        if not start or error.index is None:
            raise
        raise type(error)(error.rule, error.index + start) from error
