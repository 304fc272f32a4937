"""Golden sets of the audio input: the committed one, wrong numbers of every kind, and other tokenizers."""

import json
import shutil

import numpy as np
import pytest
import torch

from kimia.model.vq import load_vq
from kimia.verify import verify
from tests.golden_data import golden
from tests.verify.sets import SMALLEST, committed, dump, edit_json, report, unreadable

pytestmark = pytest.mark.parity

NAME = SMALLEST["tokenizer"]
CASE = f"cases.{NAME}"


@pytest.fixture
def small(tmp_path):
    return committed("tokenizer", tmp_path)


def test_golden_set():
    outcomes = list(verify(golden("tokenizer")))
    assert {outcome.status for outcome in outcomes} == {"PASS"}


def edit_array(folder, key, change, case=NAME) -> None:
    path = folder / "goldens" / f"{case}.npz"
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays, key)
    np.savez(path, **arrays)


def bump(arrays, key) -> None:
    arrays[key].flat[3] += 1e-4


KEYS = ["vq_mel_s0_0_104", "wh_mel_s0_60_108", "vq_mel_framemean_s0", "vq_in0_s0", "vq_out1_s0", "prequant", "features"]
FIELDS = {
    "samples_16k": 1,
    "wav16k_sha256_f32le": "0" * 64,
    "n_tokens": 1,
    "segment_tokens": [1],
    "segment_samples": [1],
    "token_ids": [0],
    "prefix_token_ids": {"1280": [-1]},
}


def test_every_wrong_number_fails(small):
    """All variants of the case in one set, so that encoders are loaded once."""
    goldens = small / "goldens"
    names = [*KEYS, *FIELDS]
    for name in names:
        for suffix in (".json", ".npz"):
            shutil.copy(goldens / (NAME + suffix), goldens / (name + suffix))
    for key in KEYS:
        edit_array(small, key, bump, key)
    for field, value in FIELDS.items():
        edit_json(goldens / f"{field}.json", lambda expected, field=field, value=value: expected.update({field: value}))
    edit_json(
        small / "cases.json", lambda spec: spec["cases"].extend(spec["cases"][0] | {"name": name} for name in names)
    )
    assert report(small) == {CASE: "PASS"} | {f"cases.{name}": "FAIL" for name in names}


@pytest.mark.parametrize("place", [0, 12])
def test_one_wrong_id_fails_unless_two_codes_are_equally_near(small, place):
    path = small / "goldens" / f"{NAME}.json"
    edit_json(path, lambda expected: expected["token_ids"].__setitem__(place, -1))
    assert report(small) == {CASE: "FAIL"}
    edit_json(path, lambda expected: expected.update(near_tie_positions=[place]))
    assert report(small) == {CASE: "PASS"}


def test_missing_arrays_are_not_compared(small):
    edit_array(small, "", lambda arrays, _: [arrays.pop(key) for key in list(arrays) if key != "prequant"])
    assert report(small) == {CASE: "PASS"}


def test_other_tokenizers_have_their_own_config(small):
    """Pooling, blocks, convolutions, storage and training buffers differ; the default tokenizer gives other ids."""
    other = shutil.copytree(small / "glm-4-voice-tokenizer", small / "other")
    change = {"pooling_kernel_size": 2, "pooling_type": "max", "quantize_causal_block_size": None}
    edit_json(other / "config.json", lambda config: config.update(change, encoder_causal_convolution=False))
    wave = np.zeros(16000, np.float32)
    ids = load_vq(other, "cpu").encode([wave])[0].tolist()
    dump(small / "goldens" / "b.json", {"name": "b", "token_ids": ids, "n_tokens": 25})
    with torch.no_grad():
        state = next(iter(load_vq(other, "cpu").trace(wave)))
    np.savez(small / "goldens" / "b.npz", vq_in1_s0=state["out0"].numpy())
    entry = {"name": "b", "audio": {"pieces": [{"zeros": 16000}]}, "tokenizer": "other"}
    edit_json(small / "cases.json", lambda spec: spec["cases"].append(entry))
    assert report(small) == {CASE: "PASS", "cases.b": "PASS"}
    edit_json(small / "cases.json", lambda spec: spec["cases"][1].pop("tokenizer"))
    assert report(small)["cases.b"] == "FAIL"


def test_batches(small):
    """Where the reference's ids depend on the batch, those of the recording alone count."""
    ids = json.loads((small / "goldens" / f"{NAME}.json").read_text())["token_ids"]
    edit_json(small / "cases.json", lambda spec: spec.update(batches=[{"name": "two", "members": [NAME, NAME]}]))
    batch = small / "goldens" / "batch_two.json"
    dump(batch, {"token_ids": [ids, ids]})
    assert report(small)["cases.two"] == "PASS"
    dump(batch, {"token_ids": [ids, [*ids[:-1], -1]]})
    assert report(small)["cases.two"] == "FAIL"
    dump(batch, {"token_ids": [ids, [*ids[:-1], -1]], "differs_from_solo_at": [[], [len(ids) - 1]]})
    assert report(small)["cases.two"] == "PASS"


@pytest.mark.parametrize("field", [*FIELDS, "name"])
def test_absent_fields_are_not_compared(small, field):
    edit_json(small / "goldens" / f"{NAME}.json", lambda expected: expected.pop(field, None))
    assert report(small) == {CASE: "PASS"}


def damage_case(folder):
    edit_json(folder / "cases.json", lambda spec: spec["cases"][0].pop("audio"))


def lose_arrays(folder):
    (folder / "goldens" / f"{NAME}.npz").unlink()


def lose_ids(folder):
    (folder / "goldens" / f"{NAME}.json").unlink()


@pytest.mark.parametrize("damage", [damage_case, lose_arrays, lose_ids])
def test_a_damaged_case_leaves_the_others(small, damage):
    for suffix in (".json", ".npz"):
        shutil.copy(small / "goldens" / (NAME + suffix), small / "goldens" / f"b{suffix}")
    edit_json(small / "cases.json", lambda spec: spec["cases"].append(spec["cases"][0] | {"name": "b"}))
    damage(small)
    assert list(unreadable(small)) == [CASE]
    assert report(small) == {CASE: "FAIL", "cases.b": "PASS"}


def test_a_broken_checkpoint_is_unreadable_data(small):
    (small / "glm-4-voice-tokenizer/config.json").unlink()
    assert "config.json" in unreadable(small)[CASE]
