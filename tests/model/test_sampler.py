"""The sampler against golden distributions, and its rules one by one."""

import math

import pytest
import torch
from safetensors.torch import load_file

from kimia.errors import NumericsError, ParameterError
from kimia.model.sampler import (
    Sampling,
    TrackSampling,
    _ordered,
    choose,
    distribution,
    ordered_by_bits,
    penalise,
)
from tests.golden_data import golden
from tests.model.tiny_lm import golden_or

pytestmark = pytest.mark.parity

CASES = {case["key"]: case for case in golden_or("llm", "goldens/sampler.json", {"cases": []})["cases"]}


@pytest.fixture(scope="module")
def expected():
    return load_file(golden("llm") / "goldens/sampler.safetensors")


def case_sampling(case) -> TrackSampling:
    return TrackSampling(case["temperature"], case["top_k"], case["repetition_penalty"], case["window"])


def dense(ids: torch.Tensor, probabilities: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.zeros(len(ids), vocabulary, dtype=torch.float64).scatter(-1, ids, probabilities)


@pytest.mark.parametrize("key", CASES)
def test_golden_distribution(key, expected):
    case, sampling = CASES[key], case_sampling(CASES[key])
    logits = expected[f"{key}.logits"][None]
    penalised = penalise(logits, [sampling], [case["recent"] or []])
    assert torch.equal(torch.isinf(penalised[0]), torch.isinf(expected[f"{key}.penalised_logits"]))
    torch.testing.assert_close(penalised[0], expected[f"{key}.penalised_logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(penalised.log_softmax(-1)[0], expected[f"{key}.logprobs"], atol=5e-5, rtol=0)
    ids, probabilities = distribution(penalised, [sampling])
    if case["mode"] == "greedy":
        assert choose(logits, [sampling], [case["recent"] or []], [0.99]) == [case["token"]]
        assert ids.tolist() == [[case["token"]]]
        return
    wanted = expected[f"{key}.probs"].double()
    torch.testing.assert_close(dense(ids, probabilities, len(wanted))[0], wanted, atol=1e-6, rtol=0)
    assert ids[0, : len(case["candidates"])].tolist() == case["candidates"]


# ---- penalty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "window", "touched"),
    [
        ([0, 1, 2], 2, {1, 2}),
        ([1, 2], 2, set()),  # as long as the window: none
        ([2, 2, 2, 3, 3], 4, {2, 3}),  # each id once
        ([0, 3], 0, {0, 3}),  # window 0: the whole history
        ([], 0, set()),
    ],
)
def test_penalty_touches_the_distinct_ids_of_the_window(history, window, touched):
    logits = torch.tensor([[2.0, -3.0, 4.0, -5.0]])
    penalised = penalise(logits, [TrackSampling(repetition_penalty=2.0, repetition_window=window)], [history])
    halved = {0: 1.0, 1: -6.0, 2: 2.0, 3: -10.0}
    assert penalised[0].tolist() == [halved[i] if i in touched else logits[0, i].item() for i in range(4)]
    assert logits.tolist() == [[2.0, -3.0, 4.0, -5.0]]


def test_penalty_applies_before_the_greedy_choice_and_below_one_never():
    logits = torch.tensor([[3.0, 2.0]])
    for penalty, best in ((2.0, 1), (0.1, 0)):
        params = [TrackSampling(repetition_penalty=penalty, repetition_window=0)]
        assert choose(logits, params, [[0]], [0.0]) == [best]


# ---- distribution -----------------------------------------------------------------------------------------------


def test_equal_logits_are_ordered_by_id():
    logits = torch.tensor([[1.0, 0.0, 2.0, -0.0, 2.0, 1.0, -1.0, -1.0]])
    ids, _ = distribution(logits, [TrackSampling(1.0, 0)])
    assert ids.tolist() == [[2, 4, 0, 5, 1, 3, 6, 7]]
    assert choose(logits, [TrackSampling()], [[]], [0.99]) == [2]


@pytest.mark.parametrize("levels", [2, 5, 40, 10_000])
def test_both_ways_of_ordering_agree(levels):
    """Few levels: many equal logits, within and across the border."""
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(-levels, levels, (50, 60), generator=generator) / 7
    logits[3, 5], logits[4, 8], logits[5, :9] = math.nan, math.inf, -math.inf
    for count in (1, 2, 7, 59, 60):
        assert torch.equal(_ordered(logits, count), ordered_by_bits(logits, count))


def test_order_holds_for_every_magnitude():
    values = torch.cat([torch.randn(50) * 10.0**exponent for exponent in (-30, -3, 0, 3, 30)])
    ids, _ = distribution(values[None], [TrackSampling(1.0, 0)])
    assert torch.equal(values[ids[0]], values.sort(descending=True).values)


@pytest.mark.parametrize("temperature", [2e-6, 0.01, 0.8, 1e6])
def test_softmax_is_stable_at_any_temperature(temperature):
    logits = torch.tensor([[500.0, 499.999, -500.0, 80.0]])
    ids, probabilities = distribution(logits, [TrackSampling(temperature, 3)])
    scores = [(value - 500.0) / temperature for value in logits[0, [0, 1, 3]].double().tolist()]
    wanted = torch.tensor([math.exp(score) for score in scores], dtype=torch.float64)
    assert ids.tolist() == [[0, 1, 3]]
    torch.testing.assert_close(probabilities[0], wanted / wanted.sum(), atol=1e-12, rtol=0)


def test_ids_without_probability_are_never_drawn():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    ids, probabilities = distribution(logits, [TrackSampling(1.0, 4)])
    assert dense(ids, probabilities, 4).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert choose(logits, [TrackSampling(1.0, 4)], [[]], [1.0]) == [2]


@pytest.mark.parametrize("broken", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_no_numbers_are_refused(broken, dtype):
    logits = torch.tensor([[0.0, 1.0], [0.0, broken]], dtype=dtype)
    with pytest.raises(NumericsError):
        choose(logits, [TrackSampling()] * 2, [[], []], [0.0, 0.0])


# ---- draws ------------------------------------------------------------------------------------------------------


def test_the_first_candidate_whose_cumulative_probability_exceeds_the_number():
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    for number, token in ((0.0, 1), (0.4999, 1), (0.5001, 2), (0.7499, 2), (0.7501, 0), (0.8751, 3), (1.0, 3)):
        assert choose(logits, [TrackSampling(1.0, 0)], [[]], [number]) == [token]
    tie = torch.zeros(1, 2)
    assert choose(tie, [TrackSampling(1.0, 0)], [[]], [0.5]) == [1]  # equal does not exceed


def test_rows_have_their_own_parameters():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 30, generator=generator) * 2
    params = [
        TrackSampling(),
        TrackSampling(0.7, 3),
        TrackSampling(1.3, 0, 1.5, 2),
        TrackSampling(0.0, 5, 1.9, 0),
        TrackSampling(0.9, 99),
    ]
    histories = [[], [1], [2, 3, 4], logits.argmax(-1).tolist(), [5]]
    numbers = [0.1, 0.9, 0.6, 0.5, 0.99]
    together = choose(logits, params, histories, numbers)
    alone = [choose(logits[i : i + 1], params[i : i + 1], histories[i : i + 1], numbers[i : i + 1]) for i in range(5)]
    assert together == [row[0] for row in alone]


@pytest.mark.parametrize("widest", [0, 3, 30])
def test_a_row_draws_the_same_in_any_company(widest):
    """Bit by bit: the number lies where the last bit of a sum decides."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    sampling = TrackSampling(0.9, 17)
    _, probabilities = distribution(logits, [sampling])
    for border in probabilities[0].cumsum(-1).tolist()[:17]:
        for number in (math.nextafter(border, 0), border, math.nextafter(border, 1)):
            alone = choose(logits, [sampling], [[]], [min(number, math.nextafter(1, 0))])
            among = choose(
                logits.expand(3, 50),
                [TrackSampling(1.1, widest), sampling, TrackSampling()],
                [[]] * 3,
                [0.1, min(number, math.nextafter(1, 0)), 0.5],
            )
            assert alone[0] == among[1]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    drawn = choose(logits.expand(1000, 4), [TrackSampling(0.7, 3)] * 1000, [[]] * 1000, numbers)
    weights = [math.exp(1.0 / 0.7), math.exp(0.0), math.exp(2.0 / 0.7), 0.0]
    for token, weight in enumerate(weights):
        assert abs(drawn.count(token) / 1000 - weight / sum(weights)) <= 0.001


# ---- parameters -------------------------------------------------------------------------------------------------


def test_defaults_and_names_are_upstreams():
    assert Sampling.from_arguments({}) == Sampling(
        text=TrackSampling(0.0, 5, 1.0, 16), audio=TrackSampling(0.0, 5, 1.0, 64)
    )
    arguments = {
        "audio_temperature": 0.8,
        "audio_top_k": 10,
        "audio_repetition_penalty": 1.1,
        "audio_repetition_window_size": 3,
        "text_temperature": 0.7,
        "text_top_k": 4,
        "text_repetition_penalty": 1.2,
        "text_repetition_window_size": 2,
    }
    assert Sampling.from_arguments(arguments) == Sampling(
        text=TrackSampling(0.7, 4, 1.2, 2), audio=TrackSampling(0.8, 10, 1.1, 3)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_temperature", -0.1),
        ("text_temperature", math.nan),
        ("audio_temperature", math.inf),
        ("audio_temperature", "hot"),
        ("audio_temperature", 10**400),
        ("audio_top_k", 2.5),
        ("audio_top_k", True),
        ("text_repetition_penalty", 0.0),
        ("text_repetition_penalty", -1),
        ("audio_repetition_penalty", math.inf),
        ("audio_repetition_window_size", -1),
        ("audio_repetition_window_size", 1.0),
        ("audio_top_p", 0.9),
    ],
)
def test_values_outside_the_domain_are_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        Sampling.from_arguments({name: value})


def test_a_penalty_below_one_does_nothing():
    logits = torch.tensor([[1.0, -1.0, 0.5]])
    params = [TrackSampling(repetition_penalty=0.5, repetition_window=0)]
    assert torch.equal(penalise(logits, params, [[0, 1]]), logits)


def test_the_smallest_temperature_that_draws():
    assert TrackSampling(temperature=1e-6).greedy
    assert not TrackSampling(temperature=2e-6).greedy
