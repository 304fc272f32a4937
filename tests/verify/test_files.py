"""Reading golden data: recorded pieces, stored waveforms, what is skipped, and complaints that name the file."""

import hashlib
import struct

import numpy as np
import pytest
import soundfile
import torch

from kimia.errors import GoldenSetError
from kimia.verify.files import (
    compare_wave,
    full_scale,
    join_pieces,
    listed,
    read_arrays,
    read_json,
    read_sound,
    read_tensors,
    skip_reason,
    wave_facts,
)
from kimia.verify.report import Comparison, run_case

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([100, -100, 7, -7], np.int16), 16000, subtype="PCM_16")
    return tmp_path


def test_pieces_are_integers_until_the_end(folder):
    pieces = [{"file": "a.wav", "start": 1, "stop": 4, "shift_right": 2}, {"zeros": 2}, {"file": "a.wav", "stop": 1}]
    wave = join_pieces(folder, pieces)
    assert wave.dtype == np.float32
    assert (wave * 32768).tolist() == [-25, 1, -2, 0, 0, 100]  # -7 >> 2 rounds down


def test_pieces_of_stereo_are_refused(folder):
    soundfile.write(folder / "s.wav", np.zeros((4, 2)), 16000)
    with pytest.raises(GoldenSetError, match=r"s\.wav.* 2 channels"):
        join_pieces(folder, [{"file": "s.wav"}])


def test_integers_hold_full_scale_only():
    comparison = Comparison()
    compare_wave(comparison, "wav", torch.tensor([1.05, -1.05, 0.5]), torch.tensor([1.0, -1.0, 0.5]), 1e-4)
    assert not comparison.passed
    comparison = Comparison()
    stored = torch.tensor([32767, -32767, 16384], dtype=torch.int16)
    compare_wave(comparison, "wav", torch.tensor([1.05, -1.05, 0.5]), stored, 1e-4)
    assert comparison.passed


def test_stored_waveforms():
    assert full_scale(torch.tensor([32767, -32767], dtype=torch.int16)).tolist() == [1.0, -1.0]
    half = full_scale(torch.tensor([0.5], dtype=torch.float16))
    assert (half.dtype, half.item()) == (torch.float32, 0.5)


@pytest.mark.parametrize(
    ("name", "entry", "names", "skipped"),
    [
        ("a", {}, ["a"], False),
        ("a", {"reproduces_upstream_defect": True}, ["a"], True),
        ("a", {"reproduces_upstream_defect": False}, ["a"], False),
        ("reset_upstream", {}, ["reset_upstream", "reset_fixed"], True),
        ("reset_upstream", {}, ["reset_upstream", "reset_correct"], True),
        ("reset_upstream", {}, ["reset_upstream", "other_fixed"], False),
        ("reset_fixed", {}, ["reset_upstream", "reset_fixed"], False),
    ],
)
def test_skips(name, entry, names, skipped):
    assert bool(skip_reason(name, entry, names)) is skipped


def test_facts_of_a_waveform():
    digest = hashlib.sha256(struct.pack("<3f", 0.5, -1.0, 0.0)).hexdigest()
    facts = {"samples_16k": 3, "wav16k_sha256_f32le": digest}
    assert wave_facts(np.array([0.5, -1.0, 0.0], np.float32)) == facts


def seen(entry, comparison):
    comparison.same("name", entry["name"], "a")


@pytest.mark.parametrize(
    ("entries", "lines"),
    [
        ([{"name": "a"}, {"name": "b"}], ["PASS x.a", "FAIL x.b"]),
        ([{}, 7, {"name": "a"}], ["FAIL x.[0]", "FAIL x.[1]", "PASS x.a"]),
        ([{"name": 3}], ["FAIL x.3"]),
        ([{"name": "a"}, {"name": "a"}], ["PASS x.a", "PASS x.a"]),
        ({"a": {}, "b": None}, ["PASS x.a", "FAIL x.b"]),
        ([{"name": "a_upstream"}, {"name": "a_fixed"}], ["SKIP x.a_upstream", "FAIL x.a_fixed"]),
        ([], []),
    ],
)
def test_a_wrong_entry_spoils_no_other(entries, lines):
    outcomes = [run_case(case) for case in listed("llm", "x", entries, seen)]
    assert [f"{outcome.status} {outcome.name}" for outcome in outcomes] == lines


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000])
def test_deep_nesting_is_unreadable(content, tmp_path):
    path = tmp_path / "deep.json"
    path.write_text(content)
    with pytest.raises(GoldenSetError, match=r"deep\.json: is nested too deeply"):
        read_json(path)


def read_piece(path):
    return join_pieces(path.parent, [{"file": path.name}])


def read_16k(path):
    return read_sound(path, 16000)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00"])
@pytest.mark.parametrize("read", [read_json, read_tensors, read_arrays, read_16k, read_piece])
def test_unreadable_files_are_named(read, content, tmp_path):
    path = tmp_path / "broken.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GoldenSetError, match=r"broken\.bin"):
        read(path)


def test_damaged_npz_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random(1000))
    damaged = bytearray(path.read_bytes())
    damaged[200:4000] = b"\0" * 3800
    path.write_bytes(damaged)
    with pytest.raises(GoldenSetError, match=r"a\.npz"):
        read_arrays(path)
