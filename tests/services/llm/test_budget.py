"""What is left out of a conversation that does not fit."""

import pytest

from kimia.errors import ContextLengthError, ConversationError
from kimia.model.conversation import Message
from services.llm.budget import answer_room, fit, numbered_from, turn_starts

pytestmark = pytest.mark.unit

CONTEXT = 20


def talk(roles: str) -> list[Message]:
    """Messages of the user (u) and the assistant (a)."""
    return [Message({"u": "user", "a": "assistant"}[role], "text", "") for role in roles]


@pytest.mark.parametrize(
    ("roles", "starts"),
    [("", [0]), ("u", [0]), ("uu", [0]), ("uau", [0, 2]), ("auuau", [0, 1, 4]), ("uuaauua", [0, 4])],
)
def test_a_conversation_may_begin_where_the_user_does(roles: str, starts: list[int]) -> None:
    assert turn_starts(talk(roles)) == starts


class Prompts:
    """Prompts that are only as long as the messages that are left."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.made = 0

    def lay_out(self, start: int) -> list[int]:
        self.made += 1
        return self.lengths[start:]

    def allowed(self, prompt: list[int]) -> int:
        if sum(prompt) >= CONTEXT:
            raise ContextLengthError("does not fit", len(prompt) - 1)
        return CONTEXT - sum(prompt)

    def fit(self, starts: list[int], room: int):
        return fit(starts, self.lay_out, self.allowed, room)


@pytest.mark.parametrize(
    ("lengths", "room", "dropped", "steps"),
    [
        ([5, 5, 5], 5, 0, 5),  # just so
        ([5, 5, 5], 6, 1, 10),
        ([30, 5, 5], 5, 1, 10),
        ([5, 30, 5], 5, 2, 15),
        ([5, 5, 16], 5, 2, 4),  # the last turn stays, with less room than wanted
        ([1] * 19, 1, 0, 1),
        ([1] * 60, 10, 50, 10),
        ([1] * 60, 100, 59, 19),
    ],
    ids=str,
)
def test_as_much_as_fits_is_kept(lengths: list[int], room: int, dropped: int, steps: int) -> None:
    prompts = Prompts(lengths)
    fitted = prompts.fit(list(range(len(lengths))), room)
    assert (fitted.dropped, fitted.steps, fitted.prompt) == (dropped, steps, lengths[dropped:])
    assert prompts.made <= 2 + len(lengths).bit_length()


def test_turns_go_as_a_whole() -> None:
    assert Prompts([9, 1, 1, 9, 1, 1]).fit([0, 3], 8).dropped == 3


def test_a_last_turn_that_does_not_fit_is_told_by_its_place_in_the_whole() -> None:
    with pytest.raises(ContextLengthError, match="message 3") as caught:
        Prompts([1, 1, 1, 30]).fit([0, 1, 3], 5)
    assert caught.value.index == 3


def test_what_is_wrong_with_a_message_is_not_taken_for_its_length() -> None:
    def broken(start: int) -> list[int]:
        raise ConversationError("has no content", 0)

    with pytest.raises(ConversationError, match="message 0: has no content"):
        fit([0, 1], broken, len, 1)


def test_errors_without_a_message_stay_as_they_are() -> None:
    error = ConversationError("empty")
    with pytest.raises(ConversationError) as caught, numbered_from(3):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("output_type", "limit", "say", "room"),
    [
        ("both", None, 0, 131),
        ("text", None, 0, 125),
        ("both", 20, 0, 20),
        ("both", None, 300, 301),
        ("both", 9, 300, 9),
    ],
)
def test_room_for_ten_seconds_or_what_the_caller_wants(output_type, limit, say: int, room: int) -> None:
    assert answer_room(output_type, 6, limit, say) == room
