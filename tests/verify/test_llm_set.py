"""What a set of the language model gives: optional files, named clips, prompts."""

import pytest
import torch

from kimia.errors import GoldenSetError
from kimia.model.conversation import parse_conversation
from kimia.verify.llm_set import GoldenLM
from tests.verify.sets import MESSAGES, OFFSET, dump

pytestmark = pytest.mark.unit


@pytest.fixture
def opened(llm_set):
    return GoldenLM(llm_set, torch.device("cpu"))


def test_absent_json_is_empty_and_a_list_is_refused(opened):
    assert opened.json("nowhere.json") == {}
    dump(opened.goldens / "decode.json", [])
    with pytest.raises(GoldenSetError, match=r"decode\.json: must hold a mapping"):
        opened.json("decode.json")


def test_clips_are_found_by_name(opened):
    unknown = {"role": "user", "message_type": "audio", "content": "unheard.wav"}
    clips = opened.clips(parse_conversation([*MESSAGES, unknown], opened.config))
    assert {index: clip.codes for index, clip in clips.items()} == {0: (1, 0, 2), 1: (3,)}
    assert clips[0].features.shape == (4, opened.config.adaptor_input_dim)


def test_clips_without_features_give_ids_alone(opened):
    (opened.goldens / "audio_features.safetensors").unlink()
    prompt = opened.prompt({"messages": MESSAGES, "output_type": "both"})
    assert prompt.features is None
    assert prompt.audio_ids[2:5] == (OFFSET + 1, OFFSET, OFFSET + 2)


def test_an_empty_conversation_is_the_assistant_s_start(opened):
    assert len(opened.prompt({"messages": [], "output_type": "text"})) == 1
