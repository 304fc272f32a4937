"""A turn's options in the contract's names, and the model's defaults for what is unset."""

import pytest

from kimia.errors import ParameterError
from kimia.model.presets import LOW_LATENCY, UPSTREAM
from kimia.model.sampler import Sampling
from kimia.model.sampler import TrackSampling as Track
from kimia.v1.conversation_pb2 import TrackSampling
from services.llm.options import read_options, read_sampling
from tests.services.turns import turn

pytestmark = pytest.mark.unit


class Letters:
    """A text tokenizer with an id per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_what_is_unset_has_the_librarys_defaults() -> None:
    options = read_options(turn([], seed=7), Letters())
    assert options.sampling == Sampling()
    assert (options.output_type, options.preset, options.limit, options.say) == ("both", LOW_LATENCY, None, None)
    assert options.seed == 7


def test_what_is_set_is_kept_even_where_it_is_zero() -> None:
    text = TrackSampling(temperature=0.5, top_k=0, repetition_penalty=1.2, repetition_window=0)
    asked = turn([], output_type="text", preset="upstream", max_new_tokens=9, text=text, audio={"top_k": 3})
    options = read_options(asked, Letters())
    assert options.sampling.text == Track(0.5, 0, 1.2, 0)
    assert options.sampling.audio == Track(0.0, 3, 1.0, 64)
    assert (options.output_type, options.preset, options.limit) == ("text", UPSTREAM, 9)


def test_a_text_to_say_becomes_ids() -> None:
    assert read_options(turn([], say="ab"), Letters()).say == (97, 98)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"preset": "fast"}, "preset"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": 1 << 63}, "seed"),
        ({"say": ""}, "nothing to say"),
        ({"text": TrackSampling(temperature=-1)}, "temperature"),
        ({"text": TrackSampling(temperature=float("nan"))}, "temperature"),
        ({"audio": TrackSampling(repetition_penalty=0)}, "repetition_penalty"),
        ({"audio": TrackSampling(repetition_window=-1)}, "repetition_window"),
    ],
    ids=str,
)
def test_what_lies_outside_its_domain_is_refused(wrong: dict, rule: str) -> None:
    with pytest.raises(ParameterError, match=rule):
        read_options(turn([], **wrong), Letters())


def test_an_unknown_output_type_is_refused() -> None:
    asked = turn([])
    asked.options.output_type = 7
    with pytest.raises(ParameterError, match="output_type"):
        read_options(asked, Letters())


def test_sampling_alone() -> None:
    assert read_sampling(turn([], audio={"temperature": 0.8}).options).audio.temperature == 0.8
