"""The vocabulary: every word one token, every text encodable, the release's order and file."""

import pytest

from kimia.errors import ParameterError
from kimia.model.text import TextTokenizer
from training.config import MICRO, micro_configs, write_configs
from training.texts import vocabulary
from training.vocabulary import domain_tokens, merged

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    write_configs(folder)
    return TextTokenizer.load(folder, micro_configs().lm)


def test_every_word_behind_a_space_is_one_token(tokenizer):
    for word in vocabulary():
        assert len(tokenizer.encode(f"a {word}")) == 2
        assert len(tokenizer.encode(word)) <= 3  # a text's first word may take a few


@pytest.mark.parametrize("text", ["where is my order four seven two", "Straße 472 – naïve", ""])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_size_and_the_order_of_the_bytes_are_the_release_s():
    tokens = domain_tokens(MICRO.base_tokens)
    assert len(set(tokens)) == len(tokens) == MICRO.base_tokens
    assert tokens[0] == b"!"
    assert sorted(tokens[:256]) == [bytes([value]) for value in range(256)]


def test_the_most_frequent_pair_is_merged_first():
    assert merged([b"aaab", b"aab", b"ab"], 258)[256:] == [b"aa", b"ab"]


def test_too_few_words_for_the_size_are_refused():
    with pytest.raises(ParameterError, match="lower base_tokens"):
        merged([b"ab"], 300)
