"""`kimia calibrate-flow` on a tiny checkpoint, and what its preset then does."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kimia.cli import calibrate_flow, main, up
from kimia.errors import AudioError, ParameterError
from kimia.model.preset_file import PresetFile
from kimia.model.presets import preset_of
from kimia.pipeline import KimiAudio
from tests.cli.test_up import arguments
from tests.golden_data import golden
from tests.model.preset_files import written

pytestmark = pytest.mark.parity

CLIP = str(golden("e2e") / "audio" / "clip_a2.wav")
QUICK = ["--steps", "2,3", "--spacings=0", "--look-aheads", "4", "--chunks", "6+12", "--limit", "100"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint that has been calibrated; its own files are links."""
    place = tmp_path_factory.mktemp("calibrated")
    folder = place / "model"
    folder.mkdir()
    beside = [item for item in golden("e2e").iterdir() if item.name != "model"]  # the VQ tokenizer, too
    for item in beside:
        os.symlink(item.resolve(), place / item.name)
    for item in (golden("e2e") / "model").iterdir():
        os.symlink(item.resolve(), folder / item.name)
    assert main(["calibrate-flow", str(folder), CLIP, *QUICK]) == 0
    return folder


def test_preset_report_and_picture_are_written(model):
    file = PresetFile.read(model / "presets" / "calibrated.json")
    report = json.loads((model / "presets" / "reports" / "calibrated.json").read_text(encoding="utf-8"))
    assert len(file.times) == 3  # everything is within 100 dB, so the fewest steps are taken
    assert [one["steps"] for one in report["candidates"] if one["part"] == "grid"] == [2, 3]
    assert report["chosen"]["look_ahead"] == file.schedule.look_ahead
    assert report["chosen"]["distance_db"] > 0
    assert report["seconds"] > 0
    released = report["release_tflop_per_second"]
    assert report["chosen"]["tflop_per_second"] < released["modulation of every token"]
    assert (model / "presets" / "reports" / "calibrated.svg").read_text(encoding="utf-8").startswith("<?xml")
    remarks = json.loads((model / "presets" / "calibrated.json").read_text(encoding="utf-8"))["measured"]
    assert remarks["chosen"] == report["chosen"]


def test_the_model_speaks_with_the_preset_of_its_folder(model):
    kimi = KimiAudio(model, device="cpu", dtype=torch.float32)
    options = {"max_new_tokens": 30, "seed": 7, "audio_temperature": 0.8, "audio_top_k": 10}
    question = [{"role": "user", "message_type": "text", "content": "ha"}]
    preset = preset_of(PresetFile.read(model / "presets" / "calibrated.json"))
    by_name, by_file = (
        list(kimi.stream(question, preset=name, **options))
        for name in ("calibrated", str(model / "presets" / "calibrated.json"))
    )
    codes = by_name[-1].result.audio_codes
    pcm = np.concatenate([event.pcm for event in by_name if hasattr(event, "pcm")])
    assert len(codes) > preset.push_size(0)
    assert np.array_equal(pcm, kimi.detokenizer.synthesize(codes, preset, 7).numpy())
    assert np.array_equal(pcm, np.concatenate([event.pcm for event in by_file if hasattr(event, "pcm")]))


def test_the_service_gets_the_presets_of_the_model(model, tmp_path, monkeypatch):
    monkeypatch.delenv("KIMIA_PRESETS", raising=False)
    file = str(model / "presets" / "calibrated.json")
    chosen = arguments("--model", str(model), "--preset", "calibrated")
    assert up.known_presets(chosen) == [file]
    plan = up.Plan(chosen, Path(), "redis://127.0.0.1:1/0", tmp_path, [file])
    for part in (plan.orchestrator(), *plan.stages({"llm": 1})):
        assert part.environment["KIMIA_PRESETS"] == file
        assert part.environment["KIMIA_PRESET"] == "calibrated"


def test_a_preset_file_of_elsewhere_may_be_named(tmp_path, monkeypatch):
    own = written(tmp_path)
    monkeypatch.setenv("KIMIA_PRESETS", str(own))
    chosen = arguments("--fake", "--preset", str(own))
    assert up.known_presets(chosen) == [str(own)]
    assert chosen.preset == "calm"
    with pytest.raises(ParameterError, match="low-latency, upstream, calm or a file"):
        up.known_presets(arguments("--fake", "--preset", "other"))


# ---- spoken word errors -----------------------------------------------------------------------------------------


class Said:
    """A search that speaks what it is given."""

    sample_rate = 24_000

    def speak(self, preset):
        return [torch.full((3,), float(preset.ode_points)), torch.zeros(2)]


def recognised(wave, rate):
    return {16_000: "one two three", 24_000: "one too three" if wave[0] else "one two three"}[rate]


def test_words_are_compared_with_those_of_the_audio(tmp_path):
    file = PresetFile.read(written(tmp_path))
    work = calibrate_flow.Work(Said(), [np.zeros(4)] * 2, 16_000, {})
    chosen = type("Chosen", (), {"file": file})
    assert work.word_errors(chosen, recognised) == {"29 steps": 1 / 6, "chosen": 1 / 6}
    with pytest.raises(AudioError, match="no word"):
        work.word_errors(chosen, lambda wave, rate: "")


def test_without_a_recogniser_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["calibrate-flow", "model", CLIP, "--recognizer", "small"]) == 1
    assert "pip install faster-whisper" in capsys.readouterr().err


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "steps must lie in"),
        (["--spacings=-3"], "spacing must lie in"),
        (["--limit", "-1"], "distance in dB"),
    ],
)
def test_impossible_searches_are_one_line(given, said, capsys):
    assert main(["calibrate-flow", "nowhere", CLIP, *given]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_searched(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["calibrate-flow", str(golden("e2e") / "model"), CLIP, *QUICK, "--out", str(tmp_path / "file")]) == 1
    shown = capsys.readouterr()
    assert "cannot be made" in shown.err
    assert "candidates" not in shown.err
    assert not shown.out


@pytest.mark.parametrize("name", ["low-latency", "../x"])
def test_a_name_that_no_service_would_start_with_is_said_before_anything_is_searched(name, tmp_path, capsys):
    given = ["--name", name, "--out", str(tmp_path)]
    assert main(["calibrate-flow", str(golden("e2e") / "model"), CLIP, *QUICK, *given]) == 1
    shown = capsys.readouterr()
    assert name in shown.err
    assert "candidates" not in shown.err
    assert not any(tmp_path.iterdir())


def test_a_grid_that_is_farther_than_was_asked_for_is_not_taken_silently():
    grids = [SimpleNamespace(part="grid", distance=distance) for distance in (1.73, 2.5)]
    cuts = [SimpleNamespace(part="cuts", distance=0.1)]
    assert list(calibrate_flow.beyond([*grids, *cuts], 2.0)) == []
    (line,) = calibrate_flow.beyond([*grids, *cuts], 1.0)
    assert "no grid lies within 1 dB" in line
    assert "1.73 dB" in line


def test_a_list_that_is_none_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["calibrate-flow", "nowhere", CLIP, "--steps", "a,b"])
    assert ended.value.code == 2
    assert "--steps" in capsys.readouterr().err
