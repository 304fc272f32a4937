"""The corpus: disjoint splits, a list that can be read again, and errors that name the item."""

import numpy as np
import pytest
import soundfile

from kimia.errors import AudioError, ParameterError
from training.corpus import (
    GROUPS,
    LIST,
    PACKED,
    TOKEN_SAMPLES,
    Item,
    balanced,
    held_out,
    load_clip,
    load_clips,
    pack,
    plan,
    read_list,
    write_list,
)
from training.texts import is_held_out, shop_sentences
from training.voices import BY_NAME, SPEECH_RATE, Cache

pytestmark = pytest.mark.unit

HELLO = Item("train", "hibari", "hello")


def put(folder, item, seconds):
    path = Cache(folder).path(BY_NAME[item.voice], item.text)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.ones(int(seconds * SPEECH_RATE)), SPEECH_RATE, "PCM_16")


def test_a_plan_keeps_texts_and_voices_apart():
    items = plan(speaker=30, callers=30, test=10, seed=1)
    assert len(set(items)) == len(items)
    said = [item for item in items if item.text in shop_sentences()]
    assert {item.text for item in said if item.voice == "hibari"} == shop_sentences()
    assert len([item for item in items if item.split != "train"]) == 30
    for item in items:
        assert is_held_out(item.text) == (item.split != "train")
        assert BY_NAME[item.voice].seen == (item.split != "unseen")
    assert items == plan(speaker=30, callers=30, test=10, seed=1)


def test_a_list_is_read_as_it_was_written(tmp_path):
    items = plan(speaker=3, callers=3, test=2, seed=1)
    write_list(tmp_path, items)
    assert read_list(tmp_path) == items


@pytest.mark.parametrize(
    ("line", "reason"), [("{", "no item"), ('{"split": "train"}', "no item"), (
        '{"split": "train", "voice": "nobody", "text": "hello"}', "nobody")]
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line, reason):
    write_list(tmp_path, [HELLO])
    with open(tmp_path / LIST, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ParameterError, match=f":2: .*{reason}"):
        read_list(tmp_path)


def test_a_missing_corpus_says_how_to_make_it(tmp_path):
    with pytest.raises(ParameterError, match=r"training\.corpus"):
        read_list(tmp_path)


def test_a_clip_is_padded_to_whole_tokens(tmp_path):
    put(tmp_path, HELLO, 0.5)
    clip = load_clip(tmp_path, HELLO, 1)
    assert clip.tokens == 7  # ceil(0.5 s * 12.5 Hz)
    assert len(clip.speech) == 7 * TOKEN_SAMPLES
    assert clip.speech[-1] == 0
    assert len(clip.heard()) == 7 * 1280


def test_a_sentence_of_no_length_is_refused_with_its_number(tmp_path):
    put(tmp_path, HELLO, 0.1)
    with pytest.raises(AudioError, match=r"item 5 \(hibari: 'hello'\)"):
        load_clip(tmp_path, HELLO, 5)


def test_an_unreadable_sound_is_refused_with_its_number(tmp_path):
    put(tmp_path, HELLO, 0.5)
    Cache(tmp_path).path(BY_NAME["hibari"], "hello").write_bytes(b"damaged")
    with pytest.raises(AudioError, match=r"item 5 .*cannot be read"):
        load_clip(tmp_path, HELLO, 5)


def test_clips_are_chosen_by_split_and_voice(tmp_path):
    items = [HELLO, Item("train", "flite-slt", "hello"), Item("seen", "hibari", "goodbye")]
    write_list(tmp_path, items)
    for item in items:
        put(tmp_path, item, 0.5)
    assert [clip.item for clip in load_clips(tmp_path, "train")] == items[:2]
    assert [clip.item for clip in load_clips(tmp_path, "train", "hibari")] == [HELLO]


def test_a_balanced_corpus_has_the_wanted_share_of_callers(tone_clips):
    chosen = [clip.item.voice for clip in balanced(tone_clips, 2, 1)]
    assert chosen == ["hibari", "hibari", "flite-slt"]
    assert len(balanced(tone_clips, None, None)) == len(tone_clips)


def test_held_out_clips_are_grouped_by_who_speaks(tmp_path):
    texts = Item("seen", "hibari", "goodbye"), Item("seen", "flite-slt", "hello"), Item("unseen", "flite-rms", "yes")
    write_list(tmp_path, [HELLO, *texts])
    for item in texts:
        put(tmp_path, item, 0.5)
    for group, item in zip(GROUPS, texts, strict=True):
        assert [clip.item for clip in held_out(tmp_path, group)] == [item]
    assert held_out(tmp_path, "strangers", 0) == []


def test_packed_sound_is_the_same_sound(tmp_path):
    items = [HELLO, Item("seen", "hibari", "goodbye")]
    write_list(tmp_path, items)
    for seconds, item in enumerate(items, 1):
        put(tmp_path, item, seconds / 2)
    clips = [load_clip(tmp_path, item, 1) for item in items]
    pack(tmp_path, clips)
    for clip in clips:
        Cache(tmp_path).path(BY_NAME["hibari"], clip.item.text).unlink()
        [read] = load_clips(tmp_path, clip.item.split)
        np.testing.assert_array_equal(read.speech, clip.speech)


def test_packed_sound_that_does_not_match_its_index_is_refused(tmp_path):
    write_list(tmp_path, [HELLO])
    put(tmp_path, HELLO, 0.5)
    pack(tmp_path, load_clips(tmp_path, "train"))
    np.save(tmp_path / PACKED, np.zeros(7, np.int16))
    with pytest.raises(AudioError, match="delete both"):
        load_clips(tmp_path, "train")
