"""Presets of files: what they say, what is refused, and what a process then knows."""

import pytest

from kimia.errors import ParameterError
from kimia.model.crossfade import OverlapSeam
from kimia.model.preset_file import PresetFile, adopt, files_of
from kimia.model.presets import LOW_LATENCY, find_preset, preset_of
from kimia.model.schedule import SCHEDULES, find_schedule
from tests.model.preset_files import VALUES, forgetful, written

pytestmark = pytest.mark.unit

__all__ = ["forgetful"]


def test_a_file_says_how_to_cut_and_to_solve(tmp_path):
    preset = preset_of(PresetFile.read(written(tmp_path)))
    assert (preset.name, preset.commits, preset.look_ahead, preset.kv_window) == ("calm", (6, 12), 4, 900)
    assert preset.seam == OverlapSeam(hold=8, context=16)
    assert preset.held == (2,)
    assert preset.grid.indices == (0, 200, 600)
    assert preset.grid.sizes == pytest.approx((0.2, 0.4, 0.4))
    assert not preset.waits_for_next


def test_what_is_written_is_read(tmp_path):
    file = PresetFile.read(written(tmp_path))
    file.write(tmp_path / "presets" / "other.json", measured={"distance_db": 0.5})
    assert PresetFile.read(tmp_path / "presets" / "other.json") == file
    assert files_of(tmp_path) == [tmp_path / "presets" / "other.json"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({field: None}, f"{field} is missing") for field in VALUES
    ]
    + [
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "upstream"}, "another preset upstream"),
        ({"name": 3}, "name: expected str"),
        ({"commits": []}, "at least one token"),
        ({"commits": [6, 0]}, "at least one token"),
        ({"commits": [6, "9"]}, "commits: expected int"),
        ({"look_ahead": 0}, "look_ahead must be at least 1"),
        ({"look_ahead": True}, "look_ahead: expected int"),
        ({"hold": 6}, "multiple of 4"),
        ({"context": 20}, "looks 28 mel frames back"),
        ({"kv_window": 0}, "kv_window"),
        ({"times": [0]}, "times must rise"),
        ({"times": [0.1, 1]}, "times must rise"),
        ({"times": [0, 0.5, 0.5, 1]}, "times must rise"),
        ({"times": [0, 0.9]}, "times must rise"),
        ({"times": [0, float("nan"), 1]}, "times must rise"),
        ({"times": [0, "x", 1]}, "times: expected float"),
    ],
)  # fmt: skip
def test_impossible_files_are_refused_with_their_name_and_the_rule(tmp_path, changes, rule):
    path = written(tmp_path, **changes)
    with pytest.raises(ParameterError, match=rule) as refused:
        PresetFile.read(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_what_is_no_preset_is_refused(tmp_path, content):
    path = tmp_path / "preset.json"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match="preset"):
        PresetFile.read(path)
    with pytest.raises(ParameterError, match="no preset can be read"):
        PresetFile.read(tmp_path / "nowhere.json")


@pytest.mark.usefixtures("forgetful")
def test_a_process_learns_files_and_a_default(tmp_path):
    path = written(tmp_path)
    adopt([path])
    assert find_schedule("calm").commits == (6, 12)
    assert find_preset("") is LOW_LATENCY
    adopt([path], "calm")  # again: nothing new
    assert find_schedule("").name == "calm"
    assert find_preset("").grid.indices == (0, 200, 600)
    assert list(SCHEDULES) == ["calm", "low-latency", "upstream"]
    with pytest.raises(ParameterError, match="calm, low-latency, upstream"):
        find_preset("other")


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", ["low-latency", "calm"])
def test_a_name_means_one_preset(tmp_path, name):
    if name == "calm":
        adopt([written(tmp_path)])
    with pytest.raises(ParameterError, match=f"another preset {name}"):
        adopt([written(tmp_path, name=name, look_ahead=6)])


@pytest.mark.usefixtures("forgetful")
def test_an_unknown_default_is_refused():
    with pytest.raises(ParameterError, match="low-latency, upstream"):
        adopt([], "calm")
