"""The teacher's states on disk: heard once, found by clip, resumed shard by shard."""

import numpy as np
import pytest
import torch

from kimia.errors import CheckpointError
from training.corpus import pack, write_list
from training.hearing import FRAME_SAMPLES
from training.smoke import tones
from training.states import FOLDER, Listening, keep_states, placeless, taught_clips
from training.teacher import TEACHER_WIDTH

pytestmark = pytest.mark.unit

SEGMENT = 12000  # 9.4 tokens


class Ear:
    """A teacher that hears a frame's loudness, and counts."""

    def __init__(self):
        self.heard = 0

    def hear(self, wave):
        self.heard += 1
        frames = np.pad(wave, (0, -len(wave) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
        return torch.from_numpy(np.abs(frames).mean(1, keepdims=True)).expand(-1, TEACHER_WIDTH)


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Five clips in a packed corpus, kept in shards of two."""
    monkeypatch.setattr("training.states.SHARD_CLIPS", 2)
    made = [tones(("hibari", "flite-slt")[n % 2], text, 6 + n, n) for n, text in enumerate(("a", "b", "c", "d", "e"))]
    write_list(tmp_path, [clip.item for clip in made])
    pack(tmp_path, made)
    return made


def test_states_are_found_by_clip_and_end_with_the_segment(clips, tmp_path):
    keep_states(tmp_path, clips, Ear(), SEGMENT)
    kept, states = taught_clips(tmp_path)
    assert [clip.item for clip in kept] == [clip.item for clip in clips]
    for clip in clips:
        heard = Ear().hear(clip.heard()[:SEGMENT])
        assert states(clip).dtype == torch.float16
        torch.testing.assert_close(states(clip).float(), heard, atol=1e-3, rtol=1e-3)
    assert len(states(clips[-1])) == -(-SEGMENT // FRAME_SAMPLES) < 4 * clips[-1].tokens


def test_nothing_is_heard_twice(clips, tmp_path):
    first, second, third = Ear(), Ear(), Ear()
    keep_states(tmp_path, clips[:3], first, SEGMENT)
    assert [clip.item for clip in taught_clips(tmp_path)[0]] == [clip.item for clip in clips[:3]]
    keep_states(tmp_path, clips, second, SEGMENT)
    keep_states(tmp_path, clips, third, SEGMENT)
    assert (first.heard, second.heard, third.heard) == (3, 2, 0)
    assert len(taught_clips(tmp_path)[0]) == 5


def test_a_teacher_that_breaks_off_loses_its_last_shard_only(clips, tmp_path):
    class Tired(Ear):
        def hear(self, wave):
            if self.heard == 3:
                raise RuntimeError("tired")
            return super().hear(wave)

    with pytest.raises(RuntimeError, match="tired"):
        keep_states(tmp_path, clips, Tired(), SEGMENT)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["0000.pt"]
    rest = Ear()
    keep_states(tmp_path, clips, rest, SEGMENT)
    assert rest.heard == 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and later
def test_other_processes_hear_the_same(clips, tmp_path):
    assert keep_states(tmp_path, clips, Ear(), SEGMENT, Listening(until=0.0)) == 5
    assert list((tmp_path / FOLDER).iterdir()) == []
    own = Ear()
    assert keep_states(tmp_path, clips, own, SEGMENT, Listening(workers=2)) == 0
    assert own.heard == 0
    for clip in clips:
        heard = Ear().hear(clip.heard()[:SEGMENT]).half()
        torch.testing.assert_close(taught_clips(tmp_path)[1](clip), heard, rtol=0, atol=0)


def test_a_gap_among_the_shards_overwrites_none(clips, tmp_path):
    keep_states(tmp_path, clips, Ear(), SEGMENT)
    (tmp_path / FOLDER / "0000.pt").unlink()
    keep_states(tmp_path, clips, Ear(), SEGMENT)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["0001.pt", "0002.pt", "0003.pt"]
    assert len(taught_clips(tmp_path)[0]) == 5


def test_a_corpus_that_was_never_heard_is_refused(clips, tmp_path):
    with pytest.raises(CheckpointError, match=r"run python -m training\.states"):
        taught_clips(tmp_path)


def test_what_is_usual_at_a_place_is_taken_away(clips):
    place = torch.arange(60.0)[:, None].expand(-1, TEACHER_WIDTH)
    own = {clip.item.text: float(n) for n, clip in enumerate(clips[:3])}  # 0, 1, 2: their mean is 1
    states = placeless(clips[:3], lambda clip: (place + own[clip.item.text]).half()[: 4 * clip.tokens])
    shortest = 4 * clips[0].tokens
    for clip in clips[:3]:
        assert len(states(clip)) == 4 * clip.tokens
        expected = torch.full((shortest, TEACHER_WIDTH), own[clip.item.text] - 1.0)
        torch.testing.assert_close(states(clip)[:shortest], expected)
