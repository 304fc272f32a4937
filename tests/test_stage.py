"""The one protocol: the stages form a chain, and a turn's route names them."""

import inspect

import pytest

from kimia.model.prompt import TOKEN_RATE
from kimia.runtime.fake import FakeDetokenizer, FakeLanguageModel, FakeTokenizer
from kimia.stage import CODE_SECONDS, DETOKENIZER, LLM, STAGES, TOKENIZER, Stage, route_of
from kimia.v1.turn_pb2 import (
    STAGE_NAME_DETOKENIZER,
    STAGE_NAME_LLM,
    STAGE_NAME_TOKENIZER,
    STAGE_NAME_UNSPECIFIED,
    StageName,
    Turn,
)

pytestmark = pytest.mark.unit


def test_every_stage_of_the_contract_is_there():
    assert {kind.number for kind in STAGES.values()} == set(StageName.values()) - {STAGE_NAME_UNSPECIFIED}
    assert [StageName.Name(kind.number) for kind in STAGES.values()] == [
        f"STAGE_NAME_{name.upper()}" for name in STAGES
    ]


def test_a_code_is_as_long_as_the_model_says():
    assert CODE_SECONDS == 1 / TOKEN_RATE


def test_each_stage_reads_what_the_one_before_writes():
    chain = [TOKENIZER, LLM, DETOKENIZER]
    assert [kind.reads for kind in chain] == ["input", "encoded", "tokens"]
    assert [kind.writes for kind in chain[:-1]] == [kind.reads for kind in chain[1:]]
    assert DETOKENIZER.writes == "audio"


@pytest.mark.parametrize(
    ("numbers", "kinds"),
    [
        ([], ()),
        ([STAGE_NAME_LLM], (LLM,)),
        ([STAGE_NAME_TOKENIZER, STAGE_NAME_LLM], (TOKENIZER, LLM)),
        ([STAGE_NAME_TOKENIZER, STAGE_NAME_LLM, STAGE_NAME_DETOKENIZER], (TOKENIZER, LLM, DETOKENIZER)),
    ],
)
def test_a_route_names_stages_in_order(numbers, kinds):
    assert route_of(Turn(route=numbers)) == kinds


def test_an_unknown_stage_in_a_route_is_not_passed_over():
    with pytest.raises(KeyError):
        route_of(Turn(route=[STAGE_NAME_LLM, STAGE_NAME_UNSPECIFIED]))


@pytest.mark.parametrize("stage", [FakeTokenizer(), FakeLanguageModel(), FakeDetokenizer()], ids=lambda s: s.kind.name)
def test_the_fakes_are_stages(stage):
    assert STAGES[stage.kind.name] is stage.kind
    assert inspect.iscoroutinefunction(stage.warm_up)
    assert inspect.isasyncgenfunction(stage.run)
    assert list(inspect.signature(stage.run).parameters) == list(inspect.signature(Stage.run).parameters)[1:]
