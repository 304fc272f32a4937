"""The classroom: lessons in voices, shards that come out the same and are made once."""

import random

import numpy as np
import pytest
import torch

from kimia.errors import AudioError, CheckpointError
from kimia.model.encode import AudioEncoder, EncodedAudio
from kimia.model.text import TextTokenizer
from training import voices
from training.classroom import Classroom, Lessons, make_shard, make_shards, read_shard, resampled_speech
from training.config import micro_configs, write_configs
from training.tasks import Example, Part
from training.voices import Cache, Voice

pytestmark = pytest.mark.unit

TONES = Voice("tones", "tones")


class Ears:
    """Encoders whose codes are the loudness of a token and whose features are ones."""

    def __init__(self):
        self.vq = self
        self.heard = []

    def _codes(self, wave):
        tokens = np.pad(wave, (0, -len(wave) % 1280)).reshape(-1, 1280)
        return torch.from_numpy((np.abs(tokens).mean(1) * 100).astype(int).clip(0, 511))

    def encode(self, waves):
        self.heard += waves
        return [self._codes(wave) for wave in waves]


class BothEars(Ears):
    def __init__(self):
        super().__init__()
        self.vq = Ears()

    def encode(self, waves):
        codes = super().encode(waves)
        return [EncodedAudio(tuple(one.tolist()), torch.ones(len(one), 768)) for one in codes]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    write_configs(folder)
    config = micro_configs().lm
    return TextTokenizer.load(folder, config), config


@pytest.fixture
def classroom(text, tmp_path, monkeypatch):
    """A classroom whose voices are tones, two words a second."""

    def speak(voice, words):
        return np.sin(np.arange(8000 * (1 + words.count(" ")) + 8000) * 0.1).astype(np.float32), 16000

    for engine in ("tones", "hibari"):
        monkeypatch.setitem(voices.ENGINES, engine, speak)
    tokenizer, config = text
    return Classroom(BothEars(), tokenizer, config, Cache(tmp_path / "voices"), (TONES,))


def test_a_spoken_call_becomes_codes_features_and_targets(classroom):
    call = Example("talk", (Part("user", "speech", "yes please"),), "great", spoken=True)
    made = classroom.lesson(call, random.Random(0))
    assert len(made.row.features) == len(made.row.segments) == 1
    assert max(made.audio_targets) >= classroom.config.token_offset


def test_how_fast_a_caller_speaks_is_heard(classroom):
    lengths = []
    for pace in (0.82, 1.22):
        asked = (Part("user", "text", "how fast"), Part("user", "speech", "yes please", pace))
        made = classroom.lesson(Example("style", asked, "fast", spoken=False), random.Random(0))
        lengths.append(made.row.segments[0][1])
    assert lengths[0] == pytest.approx(lengths[1] * 1.22 / 0.82, rel=0.1)


def test_some_callers_are_heard_as_they_spoke(classroom):
    asked = Example("transcribe", (Part("user", "speech", "yes please"),), "yes please", spoken=False)
    for seed in range(60):
        classroom.lesson(asked, random.Random(seed))
    said = resampled_speech(classroom.cache.speech(TONES, "yes please"))
    unchanged = [wave for wave in classroom.encoder.heard if np.array_equal(wave, said)]
    assert 4 < len(unchanged) < 24


def test_a_shard_is_the_same_for_its_seed_and_made_once(classroom, tmp_path):
    first, again, other = (tmp_path / f"{name}.pt" for name in "abc")
    make_shard(classroom, first, seed=1, count=6)
    make_shard(classroom, again, seed=1, count=6)
    make_shard(classroom, other, seed=2, count=6)
    ids = [[list(one.row.audio_ids) for one in read_shard(path)] for path in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    heard = len(classroom.encoder.heard)
    make_shard(classroom, first, seed=1, count=6)
    assert len(classroom.encoder.heard) == heard


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and later
def test_shards_of_other_processes_are_the_same_and_those_out_of_time_are_not_there(classroom, tmp_path):
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    assert not make_shards(classroom, paths, 4, 0, until=0.0)
    assert not any(path.exists() for path in paths)
    assert make_shards(classroom, paths, 4, 2)
    assert classroom.encoder.heard == []
    make_shard(classroom, tmp_path / "own.pt", seed=1, count=4)
    ids = [[list(one.row.audio_ids) for one in read_shard(path)] for path in (paths[1], tmp_path / "own.pt")]
    assert ids[0] == ids[1]


def test_batches_are_of_like_length_and_repeatable(classroom, tmp_path):
    make_shard(classroom, tmp_path / "a.pt", seed=1, count=12)
    lessons = Lessons([tmp_path / "a.pt"], seed=1, neighbours=3)
    batch = lessons.batch(4, 3)
    assert [one.row.audio_ids for one in batch] == [one.row.audio_ids for one in lessons.batch(4, 3)]
    everything = [len(one.row.audio_ids) for one in lessons.lessons]
    assert everything == sorted(everything)
    assert len(everything) == 12


def test_a_voice_that_fails_names_the_lesson_and_leaves_no_shard(classroom, tmp_path, monkeypatch):
    def fail(voice, words):
        raise AudioError("hoarse")

    for engine in ("tones", "hibari"):
        monkeypatch.setitem(voices.ENGINES, engine, fail)
    with pytest.raises(AudioError, match=r"a\.pt: lesson \d+ .*hoarse"):
        make_shard(classroom, tmp_path / "a.pt", seed=1, count=20)
    assert not (tmp_path / "a.pt").exists()


def test_missing_lessons_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="make them first"):
        Lessons([tmp_path / "none.pt"], seed=1)


def test_the_stand_ins_have_what_the_real_encoder_has():
    assert {"encode"} <= set(dir(AudioEncoder)) & set(dir(BothEars))
