"""Finding golden sets, and what is said of folders that hold none."""

import json

import pytest

from kimia.errors import GoldenSetError
from kimia.verify import GoldenSet, find_sets, verify
from tests.verify.sets import unreadable

pytestmark = pytest.mark.unit

FILES = {
    "tokenizer": ("cases.json", "goldens/a.json"),
    "llm": ("goldens/prompts.json",),
    "detokenizer": ("goldens.json",),
    "e2e": ("cases.json", "model/config.json"),
}


def lay_out(folder, stage) -> None:
    for name in FILES[stage]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize("stage", FILES)
def test_a_set_is_recognised_by_its_files_whatever_its_name(tmp_path, stage):
    lay_out(tmp_path / "x", stage)
    assert find_sets(tmp_path / "x") == [GoldenSet(stage, tmp_path / "x")]
    assert find_sets(tmp_path) == [GoldenSet(stage, tmp_path / "x")]


def test_a_language_model_s_set_may_lack_prompts(tmp_path):
    for name in ("checkpoint/config.json", "goldens/sampler.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    assert [golden.stage for golden in find_sets(tmp_path)] == ["llm"]


def test_sets_of_a_parent_come_by_name(tmp_path):
    for name, stage in (("b", "llm"), ("a", "e2e"), ("c", "llm")):
        lay_out(tmp_path / name, stage)
    (tmp_path / "other").mkdir()
    assert [golden.folder.name for golden in find_sets(tmp_path)] == ["a", "b", "c"]


def test_folders_without_a_set_are_refused(tmp_path):
    with pytest.raises(GoldenSetError, match="neither a golden set"):
        find_sets(tmp_path)
    with pytest.raises(GoldenSetError, match="no such folder"):
        find_sets(tmp_path / "nowhere")


def test_a_stage_s_folder_that_lost_its_files_is_not_passed_over(tmp_path):
    lay_out(tmp_path / "e2e", "e2e")
    (tmp_path / "llm").mkdir()
    assert find_sets(tmp_path)[1] == GoldenSet("llm", tmp_path / "llm")
    assert "llm: holds no golden set" in unreadable(tmp_path)["llm"]


@pytest.mark.parametrize("stage", ["tokenizer", "e2e", "detokenizer"])
@pytest.mark.parametrize("content", ["", "[]", "null", '{"cases": 3}', '{"cases": [{}]}'])
def test_a_malformed_listing_is_unreadable(tmp_path, stage, content):
    lay_out(tmp_path, stage)
    (tmp_path / FILES[stage][0]).write_text(content)
    if stage == "detokenizer" and content == '{"cases": [{}]}':
        content = json.dumps({"cases": {"a": 3}})
        (tmp_path / FILES[stage][0]).write_text(content)
    outcomes = list(verify(tmp_path))
    assert outcomes
    assert all(outcome.unreadable for outcome in outcomes)


def test_an_unreadable_list_leaves_the_other_sets(tmp_path):
    for stage in FILES:
        lay_out(tmp_path / stage, stage)
        (tmp_path / stage / FILES[stage][0]).write_text("{")
    assert list(unreadable(tmp_path)) == sorted(FILES)
    assert all("is not JSON" in reason for reason in unreadable(tmp_path).values())
