"""Messages of the contract as the model's, clips from pieces, and what is refused."""

import pytest
import torch

from kimia.errors import AudioError, ConversationError, StateError
from kimia.model.config import LMConfig
from kimia.model.conversation import parse_conversation
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, ROLE_UNSPECIFIED, ROLE_USER, Message, Spoken, Text
from kimia.v1.turn_pb2 import FEATURE_TYPE_F32, Chunk, Encoded
from services.llm.conversation import gather_clips, join_clips, read_messages
from tests.golden_data import golden
from tests.services.turns import FILE, heard, replayed, spoken, text, turn

pytestmark = pytest.mark.unit

WIDTH = 3


@pytest.fixture(scope="module")
def config() -> LMConfig:
    return LMConfig.read(golden("e2e") / "model" / "config.json")


def encoded(clip: int, codes: list[int], *, features: bool = True, width: int = WIDTH, **more) -> Chunk:
    piece = Encoded(clip=clip, codes=codes, **more)
    if features:
        piece.features = torch.arange(float(len(codes) * width)).numpy().tobytes()
        piece.feature_type, piece.feature_width = FEATURE_TYPE_F32, width
    return Chunk(encoded=piece)


# ---- messages ---------------------------------------------------------------------------------------------------


def test_messages_are_those_that_the_library_reads(config: LMConfig) -> None:
    offset = config.token_offset
    asked = [
        text("Hello"),
        Message(role=ROLE_ASSISTANT, text=Text(text="Yes?", ids=[5, 6])),
        heard(0),
        spoken("Sure.", number=1, format=FILE),
        spoken("Well.", codes=[1, 2]),
        Message(role=ROLE_ASSISTANT, spoken=Spoken(clip={"codes": [3]}, transcript=Text(ids=[7]))),
        text(""),
    ]
    chats = [
        {"role": "user", "message_type": "text", "content": "Hello"},
        {"role": "assistant", "message_type": "text", "content": "Yes?", "text_tokens": [5, 6]},
        {"role": "user", "message_type": "audio", "content": "a.wav"},
        {"role": "assistant", "message_type": "audio-text", "content": ["b.wav", "Sure."]},
        {
            "role": "assistant",
            "message_type": "audio-text",
            "content": [None, "Well."],
            "audio_tokens": [offset + 1, offset + 2],
        },
        {"role": "assistant", "message_type": "audio-text", "audio_tokens": [offset + 3], "text_tokens": [7]},
        {"role": "user", "message_type": "text", "content": ""},
    ]
    wanted = parse_conversation(chats, config)
    for got, like in zip(read_messages(turn(asked), config), wanted, strict=True):
        for field in ("role", "message_type", "audio_tokens", "text_tokens", "needs_codes", "needs_features"):
            assert getattr(got, field) == getattr(like, field)
        assert (got.text or None) == (like.text or None)


def test_an_answer_of_which_nothing_was_heard_has_no_codes(config: LMConfig) -> None:
    [message] = read_messages(turn([spoken("Sur")], say="Go on"), config)
    assert message.audio_tokens == ()
    assert not message.needs_codes


def test_a_text_may_be_said_after_anything(config: LMConfig) -> None:
    assert read_messages(turn([], say="Hi"), config) == ()
    assert len(read_messages(turn([text("Hello"), text("Yes?", ROLE_ASSISTANT)], say="Hi"), config)) == 2


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([], "empty"),
        ([text("a"), text("b", ROLE_ASSISTANT)], "message 1: .*nothing to answer"),
        ([text("a", ROLE_UNSPECIFIED)], "message 0: .*role"),
        ([Message(role=ROLE_USER)], "message 0: .*content"),
        ([Message(role=ROLE_USER, text=Text(ids=[1]))], "message 0: .*assistant only"),
        ([Message(role=ROLE_ASSISTANT, text=Text(ids=[1, 1 << 30])), text("a")], r"message 0: text ids\[1\]"),
        ([spoken("x", codes=[1 << 20]), text("a")], r"message 0: codes\[0\]"),
    ],
)
def test_conversations_against_the_rules(config: LMConfig, messages: list[Message], rule: str) -> None:
    with pytest.raises(ConversationError, match=rule):
        read_messages(turn(messages), config)


# ---- clips ------------------------------------------------------------------------------------------------------


async def test_pieces_are_gathered_until_every_clip_is_there() -> None:
    asked = turn([text("a"), heard(7), spoken("x", number=2, format=FILE), spoken("y", codes=[1])])
    log = [
        encoded(2, [4], features=False),
        encoded(7, [1, 2]),
        encoded(2, [5], features=False, clip_end=True),
        encoded(9, [8]),
        encoded(7, [3], clip_end=True),
        encoded(7, [6]),
    ]
    inbox = replayed(log)
    pieces = await gather_clips(asked, inbox)
    assert await anext(inbox) == log[-1]
    messages = read_messages(turn(asked.messages, say="x"), LMConfig.read(golden("e2e") / "model" / "config.json"))
    clips = join_clips(messages, pieces, WIDTH)
    assert (clips[1].codes, clips[2].codes) == ((1, 2, 3), (4, 5))
    assert clips[1].features.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert clips[2].features is None


async def test_nothing_is_read_where_nothing_is_needed() -> None:
    async def closed():
        raise AssertionError("read")
        yield

    assert await gather_clips(turn([text("a"), spoken("b", codes=[1])]), closed()) == {}


async def test_clips_that_are_lacking() -> None:
    asked = turn([text("a"), heard(0), heard(1)])
    first = encoded(0, [1], clip_end=True)
    with pytest.raises(ConversationError, match="message 2: its audio has not been encoded"):
        await gather_clips(asked, replayed([first, Chunk(final=True)]))
    with pytest.raises(StateError, match="`encoded`"):
        await gather_clips(asked, replayed([first]))


@pytest.mark.parametrize(
    ("piece", "rule"),
    [
        (encoded(0, [1, 2], features=False), "message 0: .*missing"),
        (encoded(0, [1, 2], width=2), "message 0: .*width 3"),
        (Chunk(encoded=Encoded(codes=[1], features=bytes(12), feature_type=FEATURE_TYPE_F32)), "message 0: .*rows"),
        (Chunk(encoded=Encoded(codes=[1], features=bytes(12), feature_width=3)), "message 0: .*feature_type"),
        (
            Chunk(encoded=Encoded(codes=[1], features=bytes(24), feature_type=FEATURE_TYPE_F32, feature_width=3)),
            "message 0: .*1 codes",
        ),
    ],
    ids=["missing", "width", "no width", "no type", "rows"],
)
def test_features_that_do_not_fit(config: LMConfig, piece: Chunk, rule: str) -> None:
    messages = read_messages(turn([heard()]), config)
    with pytest.raises(AudioError, match=rule):
        join_clips(messages, {0: [piece.encoded]}, WIDTH)
