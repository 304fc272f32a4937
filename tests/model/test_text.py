"""The text tokenizer against the reference's ids, a plain byte-pair encoder, and every layout of the special tokens."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia.errors import CheckpointError, ConfigError, ParameterError
from kimia.model.config import LMConfig
from kimia.model.text import RUN_CHARACTERS, SLICE_CHARACTERS, SYMBOLS, StreamDecoder, TextTokenizer, read_ranks
from tests.golden_data import golden, golden_json
from tests.model.tiny_text import (
    BASE,
    CONFIG,
    SPECIALS,
    TOKENS,
    complete,
    named,
    tiny_tokenizer,
    write_names,
    write_ranks,
)

pytestmark = pytest.mark.unit

PIECES = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LIVELY = st.text(alphabet=st.one_of(st.sampled_from("hello'SxtLL 12!\n\r\t你 é"), st.characters(codec="utf-8")))
IDS = st.lists(st.integers(0, CONFIG.token_offset - 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


def released(stage: str, folder: str) -> TextTokenizer:
    path = golden(stage) / folder
    return TextTokenizer.load(path, LMConfig.read(path / "config.json"))


def plain_encode(text: str) -> list[int]:
    """Byte-pair encoding as its definition reads: merge the pair of lowest rank until none is left."""
    rank = {token: number for number, token in enumerate(TOKENS)}
    ids = []
    for piece in PIECES.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while pairs := [(rank[a + b], k) for k, (a, b) in enumerate(pairwise(parts)) if a + b in rank]:
            k = min(pairs)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        ids += [rank[part] for part in parts]
    return ids


def streamed(tokenizer: TextTokenizer, ids: list[int], skip_special: bool = False) -> str:
    decoder = StreamDecoder(tokenizer, skip_special)
    return "".join(map(decoder.push, ids)) + decoder.finish()


# ---- reference numbers


@pytest.mark.parity
def test_golden_encoding():
    tokenizer = released("llm", "checkpoint")
    for text, ids in golden_json("llm", "goldens/prompts.json")["text_tokens"].items():
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parity
def test_golden_special_tokens():
    tokenizer = released("llm", "checkpoint")
    prompts = golden_json("llm", "goldens/prompts.json")
    by_name = {**prompts["special_tokens"], "pad": prompts["pad_id"]}
    for field, token in asdict(tokenizer.special).items():
        assert token == by_name[SYMBOLS.get(field, field)]
    for name, token in prompts["special_tokens"].items():
        assert tokenizer.decode([token]) == name


@pytest.mark.parity
def test_golden_decoding_of_runs():
    tokenizer = released("llm", "checkpoint")
    for run in golden_json("llm", "goldens/decode.json")["runs"]:
        ids = run["filtered_text_ids"]
        assert tokenizer.decode(ids) == run["text"], run["name"]
        assert streamed(tokenizer, ids) == run["text"]


@pytest.mark.parity
def test_golden_decoding_of_conversations():
    tokenizer = released("e2e", "model")
    for case in golden_json("e2e", "cases.json")["cases"]:
        assert tokenizer.decode(case["text_ids"]) == case["text"], case["name"]
        assert streamed(tokenizer, case["text_ids"]) == case["text"]


# ---- encoding


@settings(deadline=None)
@given(LIVELY)
def test_encoding_equals_the_plain_formulation_and_decodes_back(tiny, text):
    ids = tiny.encode(text)
    assert ids == plain_encode(text)
    assert tiny.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("hello", [b"hello"]),
        ("12", [b"1", b"2"]),  # digits stand alone although 12 is a token
        ("t'Sx", [b"t", b"'S", b"x"]),  # contractions of either case come before words, though Sx is a token
        ("hello  hello", [b"hello", b" ", b" h", b"e", b"ll", b"o"]),  # one space belongs to the next word
        ("  ", [b"  "]),
        (" !\nx", [b" !", b"\n", b"x"]),
        ("!\nx", [b"!\n", b"x"]),
        ("\n\nx", [b"\n\n", b"x"]),
    ],
)
def test_the_split_pattern(tiny, text, tokens):
    assert tiny.encode(text) == [TOKENS.index(token) for token in tokens]


@pytest.mark.parametrize("name", complete().values())
def test_special_tokens_in_text_are_ordinary_characters(tiny, name):
    ids = tiny.encode(f"a{name}b")
    assert max(ids) < tiny.base == BASE
    assert tiny.decode(ids) == f"a{name}b"


def test_a_lone_surrogate_is_refused(tiny):
    with pytest.raises(ParameterError, match=r"U\+D83D\) at character 2"):
        tiny.encode("ab\ud83d")


def test_long_runs_are_cut_as_in_the_release(tiny):
    pair, single = TOKENS.index(b"ll"), TOKENS.index(b"l")
    text = "x" + "l" * RUN_CHARACTERS
    assert tiny.encode(text)[-3:] == [pair, single, single]  # cut between the last two letters
    assert tiny.encode(text[:-1])[-2:] == [pair, single]
    broken = "l" * (RUN_CHARACTERS - 1) + " " + "l" * RUN_CHARACTERS  # two runs that need no cut
    assert tiny.encode(broken).count(single) == 1
    assert tiny.encode(" " * (RUN_CHARACTERS + 3)).count(TOKENS.index(b" ")) == 1
    assert tiny.decode(tiny.encode(text)) == text


def test_very_long_texts_are_cut_into_slices(tiny):
    word = "hello\n"  # two tokens
    uncut = SLICE_CHARACTERS // len(word)
    before, after = word[: SLICE_CHARACTERS % len(word)], word[SLICE_CHARACTERS % len(word) :]
    assert before == "hell"
    assert tiny.encode(word * (uncut + 1)) == tiny.encode(word) * uncut + tiny.encode(before) + tiny.encode(after)


# ---- decoding


@settings(deadline=None)
@given(IDS, st.booleans())
def test_streaming_equals_decoding_at_once(tiny, ids, skip_special):
    assert streamed(tiny, ids, skip_special) == tiny.decode(ids, skip_special)


@settings(deadline=None)
@given(LIVELY)
def test_streaming_never_shows_half_a_character(tiny, text):
    decoder = StreamDecoder(tiny)
    assert "".join(map(decoder.push, tiny.encode(text))) == text
    assert decoder.finish() == ""


def test_a_stream_holds_back_incomplete_characters(tiny):
    euro = [TOKENS.index(bytes([byte])) for byte in "€".encode()]
    decoder = StreamDecoder(tiny)
    assert [decoder.push(token) for token in euro] == ["", "", "€"]
    assert [decoder.push(euro[0]), decoder.finish(), decoder.finish()] == ["", "�", ""]
    assert decoder.push(TOKENS.index(b"x")) == "x"


def test_special_ids_are_names_or_left_out(tiny):
    ids = [*tiny.encode("he"), tiny.base, tiny.special.blank, *tiny.encode("llo")]
    assert tiny.decode(ids) == "he[BOS]<|im_kimia_text_blank|>llo"
    assert tiny.decode(ids, skip_special=True) == "hello"


@pytest.mark.parametrize("token", [-1, CONFIG.token_offset])
@pytest.mark.parametrize("skip_special", [True, False])
def test_ids_that_are_no_text_are_refused(tiny, token, skip_special):
    with pytest.raises(ParameterError, match=f"{token} is not a text id"):
        tiny.decode([token], skip_special)


# ---- special tokens


def shuffled() -> dict[int, str]:
    """A complete list in another order, media tokens moved too."""
    names = list(complete().values())
    return {BASE + (7 * index + 3) % SPECIALS: name for index, name in enumerate(names)}


@pytest.mark.parametrize(
    "names", [complete(), named(), {t: n for t, n in named().items() if n in SYMBOLS.values()}, shuffled()]
)
def test_symbols_are_found_by_name(tmp_path, names):
    ids = {name: token for token, name in names.items()}
    begin, end = ids["<|im_media_begin|>"], ids["<|im_media_end|>"]
    tokenizer = tiny_tokenizer(tmp_path, names, media_begin=begin, media_end=end)
    assert asdict(tokenizer.special) == {**{f: ids[n] for f, n in SYMBOLS.items()}, "pad": CONFIG.pad_token}
    assert all(tokenizer.decode([token]) == name for token, name in names.items())
    literals = [tokenizer.decode([token]) for token in range(BASE, CONFIG.token_offset)]
    assert len(set(literals)) == SPECIALS


@pytest.mark.parametrize(("first", "last"), [(0, 33), (2, 33), (2, SPECIALS - 1), (0, SPECIALS - 2)])
def test_a_list_without_gaps_may_still_be_a_part(tmp_path, first, last):
    listed = {token: name for token, name in complete().items() if BASE + first <= token <= BASE + last}
    tokenizer = tiny_tokenizer(tmp_path, listed)
    assert asdict(tokenizer.special)["ctd"] == BASE + 33
    assert all(tokenizer.decode([token]) == name for token, name in listed.items())
    assert len({tokenizer.decode([token]) for token in range(BASE, CONFIG.token_offset)}) == SPECIALS
    if first == 0:  # the reserved tokens that follow go on counting
        assert {token: tokenizer.decode([token]) for token in complete()} == complete()


@pytest.mark.parametrize("content", [None, "{}", '{"added_tokens_decoder": {}}', '{"added_tokens_decoder": null}'])
def test_without_a_map_the_order_of_the_release_is_used(tmp_path, content):
    write_ranks(tmp_path, TOKENS)
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    tokenizer = TextTokenizer.load(tmp_path, CONFIG)
    everything = complete()
    assert {token: tokenizer.decode([token]) for token in everything} == everything
    assert asdict(tokenizer.special)["ctd"] == BASE + 33


def test_the_released_order_counts_reserved_tokens(tmp_path):
    write_ranks(tmp_path, TOKENS)
    offset = BASE + 421
    config = replace(CONFIG, token_offset=offset, vocab_size=offset + 8, pad_token=offset - 1)
    tokenizer = TextTokenizer.load(tmp_path, config)
    reserved = {5: 0, 31: 19, 34: 20, 420: 406}
    assert {i: tokenizer.decode([BASE + i]) for i in reserved} == {
        i: f"<|reserved_token_{k}|>" for i, k in reserved.items()
    }


@pytest.mark.parity
@pytest.mark.parametrize(("stage", "folder"), [("llm", "checkpoint"), ("e2e", "model")])
def test_the_released_order_is_that_of_released_maps(tmp_path, stage, folder):
    path = golden(stage) / folder
    (tmp_path / "tiktoken.model").write_bytes((path / "tiktoken.model").read_bytes())
    tokenizer = TextTokenizer.load(tmp_path, LMConfig.read(path / "config.json"))
    listed = json.loads((path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token: tokenizer.decode([int(token)]) for token in listed} == {t: e["content"] for t, e in listed.items()}
    assert tokenizer.special == released(stage, folder).special


def without(name: str) -> dict[int, str]:
    return {token: other for token, other in complete().items() if other != name}


@pytest.mark.parametrize(
    ("names", "changes", "complaint"),
    [
        (without("<|im_kimia_speech_ctd_id|>"), {}, "no id is given for <|im_kimia_speech_ctd_id|>"),
        (complete(), {"media_begin": BASE + 19}, "kimia_media_begin = "),
        (complete(), {"media_end": BASE + 19}, "kimia_media_end = "),
        ({}, {"media_begin": BASE + 19}, "kimia_media_begin = "),
        (complete(), {"pad_token": 3}, "not a special token"),
        ({}, {"pad_token": BASE}, "not the last special token"),
        ({**named(), BASE + SPECIALS: "x"}, {}, "lies outside"),
        ({**named(), BASE - 1: "x"}, {}, "lies outside"),
        ({}, {"token_offset": BASE}, "leaves no special tokens"),
        ({**complete(), BASE: "<|im_msg_end|>"}, {}, "name of its own"),
    ],
)
def test_contradictions_between_the_files_are_refused(tmp_path, names, changes, complaint):
    with pytest.raises(ConfigError) as error:
        tiny_tokenizer(tmp_path, names, **changes)
    assert complaint in str(error.value)


def test_a_pad_token_that_contradicts_the_config_is_refused(tmp_path):
    write_ranks(tmp_path, TOKENS)
    write_names(tmp_path, complete(), pad_token="[EOS]")
    with pytest.raises(ConfigError, match="pad_token has id"):
        TextTokenizer.load(tmp_path, CONFIG)
    write_names(tmp_path, complete(), pad_token=complete()[CONFIG.pad_token])
    assert TextTokenizer.load(tmp_path, CONFIG).special.pad == CONFIG.pad_token


@pytest.mark.parametrize("listed", [["x"], {"a": {"content": "x"}}, {"300": "x"}, {"300": {}}, {"300": {"content": 3}}])
def test_a_malformed_map_is_refused(tmp_path, listed):
    write_ranks(tmp_path, TOKENS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(ConfigError, match="added_tokens_decoder must"):
        TextTokenizer.load(tmp_path, CONFIG)


# ---- tiktoken.model


def test_ranks_are_read_and_cached_nowhere(tmp_path):
    path = write_ranks(tmp_path, TOKENS)
    assert read_ranks(path) == {token: rank for rank, token in enumerate(TOKENS)}
    write_ranks(tmp_path, TOKENS[:-1])
    assert len(read_ranks(path)) == BASE - 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data + b"aGVs\n", "line 270 is not"),
        (lambda data: data + b"a-b- 269\n", "line 270 is not"),
        (lambda data: data + b"eHk= many\n", "line 270 is not"),
        (lambda data: data + b"eHk= 270\n", "do not count"),
        (lambda data: data + b"eHk= 1\n", "do not count"),
        (lambda data: b"", "single bytes"),
        (lambda data: b"\n".join(data.splitlines()[:200]), "single bytes"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, complaint):
    path = write_ranks(tmp_path, TOKENS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=complaint):
        read_ranks(path)


def test_a_missing_file_is_named():
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: cannot be read"):
        TextTokenizer.load(Path("nowhere"), CONFIG)
