"""The prompt layout: the reference's prompts and masks, a plain second formulation, and what must be refused."""

from dataclasses import dataclass, replace
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kimia.errors import ContextLengthError, ConversationError, KimiaError, ParameterError
from kimia.model.config import LMConfig
from kimia.model.conversation import Message, parse_conversation
from kimia.model.prompt import Prompt, Span, build_prompt, loss_masks, steps_allowed
from kimia.model.text import TextTokenizer
from tests.golden_data import golden, golden_json
from tests.model.tiny_text import CONFIG, tiny_tokenizer

pytestmark = pytest.mark.unit

OFFSET = CONFIG.token_offset
WIDTH = CONFIG.adaptor_input_dim


def owners(prompt: Prompt) -> tuple[int | None, ...]:
    """Per position: the message it belongs to, None for the start of the answer."""
    return tuple(span.message for span in prompt.spans for _ in range(span.length))


@dataclass(frozen=True)
class Clip:
    """What the encoders would give."""

    codes: tuple[int, ...]
    features: torch.Tensor | None = None


def clip(*codes, surplus=0):
    return Clip(codes, torch.arange((len(codes) + surplus) * WIDTH).reshape(-1, WIDTH).float())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


def text(role, content):
    return Message(role, "text", text=content)


def audio(role="user", tokens=None):
    return Message(role, "audio", audio="a.wav", audio_tokens=tokens)


def spoken(transcript, role="assistant"):
    return Message(role, "audio-text", text=transcript, audio="a.wav")


# ---- reference numbers


def check_golden(prompt: Prompt, expected: dict[str, list[int]]):
    assert list(prompt.audio_ids) == expected["audio_token_ids"]
    assert list(prompt.text_ids) == expected["text_token_ids"]
    assert list(prompt.is_continuous) == expected["is_continuous_mask"]
    audio_mask, text_mask = loss_masks(prompt)
    assert list(audio_mask) == expected["audio_loss_mask"]
    assert list(text_mask) == expected["text_loss_mask"]


class GoldenSet:
    """The prompts of the language-model set, with its checkpoint's tokenizer and its clips."""

    def __init__(self):
        folder = golden("llm")
        self.config = LMConfig.read(folder / "checkpoint" / "config.json")
        self.tokenizer = TextTokenizer.load(folder / "checkpoint", self.config)
        self.features = load_file(folder / "goldens" / "audio_features.safetensors")
        self.prompts = golden_json("llm", "goldens/prompts.json")

    def clip(self, name):
        return Clip(tuple(self.prompts["audio_inputs"][name]["codes"]), self.features[f"features.{name}"])

    def build(self, raw, output_type, start):
        messages = parse_conversation(raw, self.config, must_end_with_user=start)
        names = {i: m["content"] for i, m in enumerate(raw) if m["message_type"] != "text"}
        encoded = {i: self.clip(name if isinstance(name, str) else name[0]) for i, name in names.items()}
        return build_prompt(messages, encoded, output_type, self.config, self.tokenizer, start)


@pytest.fixture(scope="module")
def golden_set():
    return GoldenSet()


@pytest.mark.parity
def test_golden_prompts_and_loss_masks(golden_set):
    for case in golden_set.prompts["cases"]:
        prompt = golden_set.build(case["messages"], case["output_type"], case["add_assistant_start_msg"])
        check_golden(prompt, case)
        order = case["continuous_feature_order"]
        assert (prompt.features is None) == (not order)
        for name, (_, length), rows in zip(order, prompt.segments, prompt.features or (), strict=True):
            assert torch.equal(rows, golden_set.features[f"features.{name}"][:length])


@pytest.mark.parity
def test_golden_rejections(golden_set):
    for case in golden_set.prompts["rejected"]:
        start = not case["name"].endswith("no_start")
        if case["name"] == "audio_tokens_given":
            prompt = golden_set.build(case["messages"], case["output_type"], start)
            tokens = case["messages"][0]["audio_tokens"]
            assert list(prompt.audio_ids[2 : 2 + len(tokens)]) == tokens
            assert prompt.features is not None
            assert len(prompt.features[0]) == len(tokens)
            continue
        with pytest.raises(KimiaError):
            golden_set.build(case["messages"], case["output_type"], start)


@pytest.mark.parity
def test_golden_training_examples(golden_set):
    stored = load_file(golden("llm") / "goldens" / "finetune.safetensors")
    for sample in golden_json("llm", "goldens/finetune.json")["samples"]:
        prompt = golden_set.build(sample["sample"]["conversation"], sample["output_type"], False)
        key = sample["key"]
        assert list(prompt.audio_ids) == stored[f"{key}.input_ids"].tolist()
        assert list(prompt.text_ids) == stored[f"{key}.text_input_ids"].tolist()
        assert list(prompt.is_continuous) == stored[f"{key}.is_continuous_mask"].tolist()
        for mask, name in zip(loss_masks(prompt), ("audio", "text"), strict=True):
            assert [*mask[1:], False] == stored[f"{key}.{name}_loss_mask"].tolist()  # stored shifted
            assert sum(mask) == sample[f"n_{name}"]


@pytest.mark.parity
def test_golden_conversations():
    folder = golden("e2e") / "model"
    config = LMConfig.read(folder / "config.json")
    tokenizer = TextTokenizer.load(folder, config)
    cases = golden_json("e2e", "cases.json")
    for case in cases["cases"]:
        messages = parse_conversation(case["messages"], config)
        frames = iter(case["continuous_feature_frames"])
        encoded = {}
        for index, message in enumerate(messages):
            if message.message_type != "text":
                codes = tuple(cases["audio"][message.audio]["vq_codes"])
                features = torch.zeros(next(frames), config.adaptor_input_dim) if message.needs_features else None
                encoded[index] = Clip(codes, features)
        prompt = build_prompt(messages, encoded, case["output_type"], config, tokenizer)
        assert list(prompt.audio_ids) == case["prompt_audio_ids"], case["name"]
        assert list(prompt.text_ids) == case["prompt_text_ids"], case["name"]
        assert list(prompt.is_continuous) == case["is_continuous_mask"], case["name"]


@pytest.mark.parity
def test_golden_budgets():
    config = LMConfig.read(golden("e2e") / "model" / "config.json")
    cases = golden_json("e2e", "cases.json")["cases"]
    both = [case for case in cases if case["output_type"] == "both"]
    shares = {
        steps_allowed(len(case["prompt_audio_ids"]), "both", 3, config, "upstream") == case["max_new_tokens"]
        for case in both
        if case["stop"] == "audio_eod"
    }
    assert shares == {True}
    for case in cases:
        allowed = steps_allowed(len(case["prompt_audio_ids"]), case["output_type"], case["max_new_tokens"], config)
        assert allowed == case["max_new_tokens"]


# ---- examples


def symbols(tokenizer: TextTokenizer, ids: tuple[int, ...]) -> str:
    """Ids as in the module's picture: control symbols by letters, codes as c<number>, text by its bytes."""
    short = {"user_start": "U", "assistant_start": "A", "blank": ".", "media_begin": "(", "media_end": ")"}
    short |= {"ct": "CT", "ctd": "CTD", "msg_end": "END", "text_eos": "EOS"}
    names = {getattr(tokenizer.special, field): letters for field, letters in short.items()}
    return " ".join(
        names.get(token) or (f"c{token - OFFSET}" if token >= OFFSET else tokenizer.decode([token])) for token in ids
    )


EXAMPLES = [
    (
        [text("user", "xyz"), audio()],
        ("text", True),
        "U . . . ( c1 c2 ) CT END A",
        ". x y z . . . . . . .",
    ),
    (
        [text("user", "xyz"), audio()],
        ("both", True),
        "U . . . ( c1 c2 ) CTD END A",
        ". x y z . . . . . . .",
    ),
    (
        [audio(), text("user", "x")],
        ("both", True),
        "U ( c1 c2 ) . END A",
        ". . . . . x . .",
    ),
    (
        [audio(), audio()],
        ("text", True),
        "U ( c1 c2 ) ( c1 c2 ) CT END A",
        ". . . . . . . . . . . .",
    ),
    (
        [audio(), spoken("abc"), text("user", "")],
        ("both", True),
        "U ( c1 c2 ) CTD END A . . . c1 c2 END U END A",
        ". . . . . . . . a b c . . . . . .",
    ),
    (
        [spoken("abcde"), text("assistant", "x"), text("assistant", "")],
        ("text", False),
        "A . . . c1 c2 . . . END",
        ". a b c d e x EOS EOS .",
    ),
    (
        [text("user", "x"), audio("assistant")],
        ("both", False),
        "U . END A ( c1 c2 ) CTD END",
        ". x . . . . . . . .",
    ),
    (
        [text("user", "x"), text("assistant", "y")],
        ("text", True),
        "U . END A . . END A",
        ". x . . y EOS . .",
    ),
]


@pytest.mark.parametrize(("messages", "options", "audio_track", "text_track"), EXAMPLES)
def test_examples(tiny, messages, options, audio_track, text_track):
    encoded = {i: clip(1, 2) for i, m in enumerate(messages) if m.message_type != "text"}
    prompt = build_prompt(messages, encoded, options[0], CONFIG, tiny, options[1])
    assert symbols(tiny, prompt.audio_ids) == audio_track
    assert symbols(tiny, prompt.text_ids) == text_track


def test_spans_say_what_each_position_is(tiny):
    messages = [audio(), text("assistant", "xy"), text("user", "")]
    prompt = build_prompt(messages, {0: clip(1, 2)}, "text", CONFIG, tiny)
    assert prompt.spans == (
        Span("role start", "user", 0, 0, 1),
        Span("media begin", "user", 0, 1, 1),
        Span("codes", "user", 0, 2, 2),
        Span("media end", "user", 0, 4, 1),
        Span("wanted output", "user", 0, 5, 1),
        Span("turn end", "user", 0, 6, 1),
        Span("role start", "assistant", 1, 7, 1),
        Span("text", "assistant", 1, 8, 2),
        Span("text end", "assistant", 1, 10, 1),
        Span("turn end", "assistant", 1, 11, 1),
        Span("role start", "user", 2, 12, 1),
        Span("text", "user", 2, 13, 0),
        Span("turn end", "user", 2, 13, 1),
        Span("role start", "assistant", None, 14, 1),
    )
    assert owners(prompt) == (0,) * 7 + (1,) * 5 + (2,) * 2 + (None,)
    assert prompt.segments == ((2, 2),)
    assert len(prompt) == 15


def test_loss_falls_on_what_the_assistant_says(tiny):
    messages = [audio(), text("assistant", "xy"), audio(), audio("assistant"), text("user", "x"), spoken("x")]
    encoded = {0: clip(1), 2: clip(1), 3: clip(1, 2), 5: clip(1)}
    prompt = build_prompt(messages, encoded, "both", CONFIG, tiny, add_assistant_start=False)
    audio_mask, text_mask = loss_masks(prompt)
    audio_targets = tuple(token for token, target in zip(prompt.audio_ids, audio_mask, strict=True) if target)
    text_targets = tuple(token for token, target in zip(prompt.text_ids, text_mask, strict=True) if target)
    assert symbols(tiny, audio_targets) == "c1 c2 )"
    assert symbols(tiny, text_targets) == "x y EOS"


# ---- a second formulation: turn by turn, as two lists of symbols


def plain_layout(messages, codes, output_type, delay, tokenizer):
    s, blank = tokenizer.special, tokenizer.special.blank
    rows: list[tuple[int, int, bool]] = []  # (audio, text, continuous)
    for role, turn in groupby(enumerate(messages), key=lambda item: item[1].role):
        rows.append((s.user_start if role == "user" else s.assistant_start, blank, False))
        for index, message in turn:
            ids = [] if message.text is None else tokenizer.encode(message.text)
            if message.message_type == "text":
                rows += [(blank, token, False) for token in ids]
                rows += [(blank, s.text_eos, False)] if role == "assistant" else []
            elif message.message_type == "audio":
                rows.append((s.media_begin, blank, False))
                rows += [(OFFSET + code, blank, True) for code in codes[index]]
                rows.append((s.media_end, blank, False))
            else:
                left = [blank] * delay + [OFFSET + code for code in codes[index]]
                right = ids + [blank] * (len(left) - len(ids))
                rows += [(a, t, False) for a, t in zip(left, right, strict=True)]
        if message.message_type == "audio":
            rows.append((s.ctd if output_type == "both" else s.ct, blank, False))
        rows.append((s.msg_end, blank, False))
    return [*rows, (s.assistant_start, blank, False)]


@st.composite
def conversations(draw):
    messages, codes = [], {}
    for index in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["text", "audio", "audio-text"]))
        if kind != "text":
            codes[index] = draw(st.lists(st.integers(0, CONFIG.audio_codes - 1), min_size=1, max_size=5))
        # short enough for any audio, even without delay
        words = draw(st.text(alphabet="hexl", max_size=1 if kind == "audio-text" else 9))
        role = draw(st.sampled_from(["user", "assistant"]))
        messages.append(Message(role, kind, text=None if kind == "audio" else words))
    return messages, codes


@settings(deadline=None)
@given(conversations(), st.sampled_from(["text", "both"]), st.integers(0, 8))
def test_layout_equals_the_plain_formulation(tiny, conversation, output_type, delay):
    messages, codes = conversation
    config = replace(CONFIG, audio_delay=delay)
    encoded = {index: clip(*values, surplus=index % 2) for index, values in codes.items()}
    prompt = build_prompt(messages, encoded, output_type, config, tiny)
    rows = list(zip(prompt.audio_ids, prompt.text_ids, prompt.is_continuous, strict=True))
    assert rows == plain_layout(messages, codes, output_type, delay, tiny)


@settings(deadline=None)
@given(conversations())
def test_invariants(tiny, conversation):
    messages, codes = conversation
    encoded = {index: clip(*values, surplus=1) for index, values in codes.items()}
    prompt = build_prompt(messages, encoded, "both", CONFIG, tiny)
    assert len(prompt.audio_ids) == len(prompt.text_ids) == len(owners(prompt)) == len(prompt)
    ends = [span.begin + span.length for span in prompt.spans]
    assert [span.begin for span in prompt.spans] == [0, *ends[:-1]]
    assert ends[-1] == len(prompt)
    for begin, length in prompt.segments:
        assert prompt.audio_ids[begin - 1] == CONFIG.media_begin
        assert prompt.audio_ids[begin + length] == CONFIG.media_end
        assert min(prompt.audio_ids[begin : begin + length]) >= OFFSET
    assert sum(prompt.is_continuous) == sum(length for _, length in prompt.segments)
    features = prompt.features or ()
    assert [len(rows) for rows in features] == [length for _, length in prompt.segments]
    clips = [encoded[index] for index, message in enumerate(messages) if message.needs_features]
    assert all(torch.equal(rows, c.features[:-1]) for rows, c in zip(features, clips, strict=True))


# ---- ids instead of encoding


def test_generated_ids_go_back_without_encoding(tiny):
    ids = tuple(tiny.encode("hello"))
    codes = (OFFSET + 1, OFFSET + 2)
    by_text = [text("user", "x"), spoken("hello"), text("user", "x"), text("assistant", "hello"), text("user", "x")]
    by_ids = [
        by_text[0],
        Message("assistant", "audio-text", audio_tokens=codes, text_tokens=ids),
        by_text[2],
        Message("assistant", "text", text="shown, not encoded", text_tokens=ids),
        by_text[4],
    ]
    expected = build_prompt(by_text, {1: clip(1, 2)}, "both", CONFIG, tiny)
    prompt = build_prompt(by_ids, {}, "both", CONFIG, tiny)
    assert (prompt.audio_ids, prompt.text_ids) == (expected.audio_ids, expected.text_ids)
    assert prompt.spans == expected.spans


def test_given_audio_ids_take_the_place_of_codes(tiny):
    prompt = build_prompt([audio(tokens=(OFFSET, OFFSET + 3))], {0: clip(7, 7, 7)}, "text", CONFIG, tiny)
    assert symbols(tiny, prompt.audio_ids) == "U ( c0 c3 ) CT END A"
    assert torch.equal(prompt.features[0], clip(7, 7, 7).features[:2])


def test_ids_alone_can_be_laid_out(tiny):
    prompt = build_prompt([audio(), audio()], {0: Clip((1,)), 1: Clip((2,))}, "text", CONFIG, tiny)
    assert prompt.features is None
    assert prompt.segments == ((2, 1), (5, 1))


def test_a_prompt_is_shared_not_changed(tiny):
    prompt = build_prompt([audio()], {0: clip(1)}, "text", CONFIG, tiny)
    assert {prompt: 1}[prompt] == 1
    with pytest.raises(AttributeError):
        prompt.audio_ids = ()


# ---- refusals


@pytest.mark.parametrize("delay", [0, 3])
def test_a_transcript_longer_than_its_audio_is_refused(tiny, delay):
    config = replace(CONFIG, audio_delay=delay)
    fits = [text("user", "x"), spoken("xyz"[:2] + "x" * delay), text("user", "x")]
    build_prompt(fits, {1: clip(1, 2)}, "both", config, tiny)
    with pytest.raises(ConversationError) as error:
        build_prompt(fits, {1: clip(1)}, "both", config, tiny)
    assert error.value.index == 1
    assert f"{2 + delay} tokens, its audio only 1 codes after a delay of {delay}" in error.value.rule


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (Clip((1, 2), torch.zeros(1, WIDTH)), "do not fit 2 codes"),
        (Clip((1, 2), torch.zeros(2, WIDTH + 1)), "width"),
        (Clip((1, 2), torch.zeros(2 * WIDTH)), "do not fit 2 codes"),
        (Clip((1, 2)), "has no continuous features although"),
        (Clip((1, -1), torch.zeros(2, WIDTH)), "code -1"),
        (Clip((CONFIG.audio_codes,), torch.zeros(1, WIDTH)), f"knows 0..{CONFIG.audio_codes - 1}"),
        (Clip((), torch.zeros(0, WIDTH)), "too short"),
        (None, "has not been encoded"),
    ],
)
def test_clips_that_do_not_fit_are_refused(tiny, wrong, rule):
    encoded = {0: clip(1), 2: wrong} if wrong else {0: clip(1)}
    with pytest.raises(ConversationError) as error:
        build_prompt([audio(), text("user", "x"), audio()], encoded, "text", CONFIG, tiny)
    assert error.value.index == 2
    assert rule in error.value.rule


def test_one_row_does_not_stand_for_many(tiny):
    """The release repeats a single feature row over all codes."""
    with pytest.raises(ConversationError, match="do not fit 3 codes"):
        build_prompt([audio()], {0: Clip((1, 2, 3), torch.zeros(1, WIDTH))}, "text", CONFIG, tiny)


def test_another_output_type_is_refused(tiny):
    with pytest.raises(ParameterError, match="output_type"):
        build_prompt([text("user", "x")], {}, "audio", CONFIG, tiny)


# ---- budgets

LONG = replace(CONFIG, max_positions=8192, audio_delay=6)


@pytest.mark.parametrize(
    ("length", "output_type", "caller", "allowed"),
    [
        (100, "both", None, 1506),  # 120 s after the delay
        (100, "both", -1, 1506),
        (100, "both", 20, 20),
        (100, "both", 9999, 1506),
        (2000, "both", None, 1506),  # long calls go on
        (8000, "both", None, 192),
        (8191, "both", None, 1),
        (100, "text", None, 8092),
        (100, "text", -1, 8092),
        (100, "text", 7, 7),
        (8000, "text", 500, 192),
    ],
)
def test_the_answer_fits_the_context(length, output_type, caller, allowed):
    assert steps_allowed(length, output_type, caller, LONG) == allowed


@pytest.mark.parametrize(
    ("length", "output_type", "caller", "allowed"),
    [
        (100, "both", None, 1400),
        (100, "both", 20, 1400),
        (1499, "both", None, 1),
        (1500, "both", None, 0),
        (9000, "both", None, 0),
        (100, "text", None, 7400),
        (100, "text", -1, 7400),
        (7600, "text", -1, 0),
        (100, "text", 20, 20),
        (7600, "text", 20, 20),
    ],
)
def test_the_rule_of_the_release(length, output_type, caller, allowed):
    assert steps_allowed(length, output_type, caller, LONG, "upstream") == allowed


@pytest.mark.parametrize("length", [8192, 9000])
@pytest.mark.parametrize("output_type", ["text", "both"])
def test_a_prompt_without_room_for_an_answer_is_refused(length, output_type):
    with pytest.raises(ContextLengthError, match=f"takes {length} positions and the model has 8192"):
        steps_allowed(length, output_type, None, LONG)


@pytest.mark.parametrize("rule", ["context", "upstream"])
@pytest.mark.parametrize("caller", [0, -2, 1.5, "10", True])
def test_an_illegal_limit_is_refused(caller, rule):
    with pytest.raises(ParameterError, match="max_new_tokens must be a positive integer"):
        steps_allowed(10, "both", caller, LONG, rule)


def test_another_rule_or_output_type_is_refused():
    with pytest.raises(ParameterError, match="budget rule"):
        steps_allowed(10, "text", None, LONG, "generous")
    with pytest.raises(ParameterError, match="output_type"):
        steps_allowed(10, "speech", None, LONG)
