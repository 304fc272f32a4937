"""The `kimia verify` command: its lines, its last line, its exit codes."""

import re
import shutil
from pathlib import Path

import pytest

from kimia.cli import main
from tests.golden_data import COMMITTED
from tests.verify.sets import SMALLEST, committed, edit_json, edit_tensor, write_detokenizer, write_llm

pytestmark = pytest.mark.parity

CLIP = COMMITTED / "e2e" / "audio" / "clip_b2.wav"
LINE = re.compile(r"(PASS|FAIL|SKIP) (tokenizer|llm|detokenizer|e2e) \S+ \S+<=\S+( .+)?")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small set of every stage."""
    folder = tmp_path_factory.mktemp("sets")
    for stage in SMALLEST:
        committed(stage, folder)
    write_llm(folder)
    write_detokenizer(folder)
    return folder


@pytest.fixture
def sets(written, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "sets"))


def test_all_stages_pass_and_every_line_has_its_form(sets, capsys):
    assert main(["verify", str(sets)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    passed = [line for line in lines if line.startswith("PASS")]
    assert {line.split()[1] for line in passed} == {"tokenizer", "llm", "detokenizer", "e2e"}
    assert last == f"{len(passed)}/{len(passed)} cases"
    assert len(lines) > len(passed)  # the skipped ones are not counted


def break_tokenizer(folder) -> None:
    name = f"goldens/{SMALLEST['tokenizer']}.json"
    edit_json(folder / "tokenizer" / name, lambda expected: expected["token_ids"].__setitem__(5, 1))


def break_e2e(folder) -> None:
    path = folder / "e2e" / f"{SMALLEST['e2e']}.safetensors"
    edit_tensor(path, "wav", lambda wave: wave[1000:1001].add_(9))


def break_llm(folder) -> None:
    path = folder / "llm/goldens/prefill.safetensors"
    edit_tensor(path, "history.text_hidden", lambda hidden: hidden[3, 3].add_(1e-4))


def break_detokenizer(folder) -> None:
    path = folder / "detokenizer/voice_stream.safetensors"
    edit_tensor(path, "chunk1.mel", lambda mel: mel[2, 2].add_(1e-3))


@pytest.mark.parametrize("damage", [break_tokenizer, break_e2e, break_llm, break_detokenizer])
def test_one_wrong_number_in_a_stage_exits_1(sets, damage, capsys):
    damage(sets)
    stage = damage.__name__.removeprefix("break_")
    assert main(["verify", str(sets / stage)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAIL")] == [stage]
    passed, compared = lines[-1].removesuffix(" cases").split("/")
    assert int(passed) == int(compared) - 1


def shown(arguments, capsys) -> str:
    """What is printed of unreadable data: the count stays the last line."""
    assert main(["verify", *map(str, arguments)]) == 2
    streams = capsys.readouterr()
    assert "Traceback" not in streams.out + streams.err
    assert re.fullmatch(r"\d+/\d+ cases", streams.out.splitlines()[-1])
    return streams.out + streams.err


def test_nothing_to_verify_exits_2(tmp_path, capsys):
    assert "neither a golden set" in shown([tmp_path], capsys)
    assert "no such folder" in shown([tmp_path / "nowhere"], capsys)


def test_a_set_without_cases_exits_2(tmp_path, capsys):
    folder = committed("tokenizer", tmp_path)
    edit_json(folder / "cases.json", lambda spec: spec.update(cases=[], batches=None))
    assert "holds no case" in shown([folder], capsys)


@pytest.mark.parametrize("name", ["cases.json", "model/config.json", "model/vocoder/model.pt", "model/tiktoken.model"])
def test_unreadable_data_exit_2(tmp_path, name, capsys):
    folder = committed("e2e", tmp_path)
    (folder / name).write_bytes(b"{")
    assert name in shown([folder], capsys)


def test_a_field_of_another_type_exits_2(tmp_path, capsys):
    folder = committed("e2e", tmp_path)
    edit_json(folder / "cases.json", lambda spec: spec["cases"][0].update(messages=7))
    assert "malformed" in shown([folder], capsys)


def test_a_damaged_case_leaves_the_report_whole(sets, capsys):
    assert main(["verify", str(sets)]) == 0
    whole = capsys.readouterr().out.splitlines()
    edit_json(sets / "llm/goldens/decode.json", lambda decode: decode["runs"][0].pop("messages"))
    lines = shown([sets], capsys).splitlines()
    (line,) = (line for line in lines if line.startswith("FAIL"))
    assert re.fullmatch(r"FAIL llm decode\.history_both inf<=0 .*malformed.*'messages'.*", line)
    assert [line.split()[:3] for line in lines[:-1] if line.startswith("PASS")] == [
        line.split()[:3] for line in whole[:-1] if line.startswith("PASS") and "history_both" not in line
    ]
    passed, compared = lines[-1].removesuffix(" cases").split("/")
    assert (int(passed) + 1, f"{compared}/{compared} cases") == (int(compared), whole[-1])


@pytest.mark.parametrize("name", ["detokenizer/goldens.json", "e2e/cases.json"])
def test_a_set_that_cannot_be_listed_leaves_the_others(sets, name, capsys):
    (sets / name).write_text("[" * 200_000)
    assert main(["verify", str(sets)]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ")
    assert name in streams.err
    lines = streams.out.splitlines()
    stages = {line.split()[1] for line in lines if line.startswith("PASS")}
    assert stages == {"tokenizer", "llm", "detokenizer", "e2e"} - {name.partition("/")[0]}
    assert re.fullmatch(r"(\d+)/\1 cases", lines[-1])


def test_unknown_device_exits_2(tmp_path, capsys):
    assert "is not a device" in shown([tmp_path, "--device", "abacus"], capsys)


# ---- what quantisation costs ------------------------------------------------------------------------------------


def test_a_models_loss_is_printed_and_nothing_is_judged(tiny, capsys):
    assert main(["verify", str(tiny), str(CLIP), "--quantize", "int8"]) == 0
    first, text, audio, size = capsys.readouterr().out.splitlines()
    assert first == f"int8 against the same weights as they are, over answers to {CLIP.name}"
    for track, line in (("text", text), ("audio", audio)):
        assert re.fullmatch(
            rf"{track} +logits: error at most \S+, mean \S+   KL divergence: mean \S+, at most \S+ nats   "
            r"greedy token the same at \d+ of \d+ positions \(\d+\.\d%\)",
            line,
        )
    assert re.fullmatch(r"language model: [\d,]+ -> [\d,]+ bytes \(\d\d\.\d%\)", size)


def test_recordings_belong_to_a_measurement(sets, capsys):
    assert main(["verify", str(sets), str(CLIP)]) == 1
    assert "recordings are for --quantize" in capsys.readouterr().err


def test_a_measurement_needs_a_model(tmp_path, capsys):
    assert main(["verify", str(tmp_path), "--quantize", "int8"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
