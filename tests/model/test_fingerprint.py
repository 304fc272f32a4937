"""The name of a checkpoint's weights."""

from pathlib import Path

import pytest

from kimia.model.fingerprint import SAMPLE_BYTES, SAMPLES, fingerprint

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * SAMPLES * SAMPLE_BYTES)
    return made


def test_the_same_files_elsewhere_have_the_same_name(folder: Path) -> None:
    before = fingerprint([folder], "float32")
    assert before == fingerprint([folder.rename(folder.with_name("moved"))], "float32")
    assert len(before) == 16


@pytest.mark.parametrize("place", [0, 100, -1])
def test_other_weights_have_another(folder: Path, place: int) -> None:
    before = fingerprint([folder])
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert fingerprint([folder]) != before


def test_size_config_names_and_conditions_count(folder: Path) -> None:
    names = [fingerprint([folder]), fingerprint([folder], "bfloat16"), fingerprint([folder, folder])]
    (folder / "config.json").write_text("{ }")
    names.append(fingerprint([folder]))
    (folder / "config.json").rename(folder / "other.json")
    names.append(fingerprint([folder]))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    names.append(fingerprint([folder]))
    assert len(set(names)) == len(names)
