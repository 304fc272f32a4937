"""Speech as codes, mel and sound of one length."""

import itertools

import pytest
import torch

from kimia.errors import AudioError, ParameterError
from training.corpus import TOKEN_SAMPLES
from training.smoke import tones
from training.speaking import FRAMES_PER_TOKEN, PLACES, Speaking, Spoken
from training.texts import DIGITS

pytestmark = pytest.mark.unit


class Counting:
    """A tokenizer whose codes are the positions."""

    def __init__(self):
        self.asked = 0

    def encode(self, waves):
        self.asked += 1
        return [torch.arange(-(-len(wave) // 1280)) for wave in waves]


@pytest.fixture
def speaker_clips(tone_clips):
    return [clip for clip in tone_clips if clip.item.voice == "hibari"]


def speaking(configs, clips, tokenizer=None):
    return Speaking(clips, tokenizer, configs.flow, configs.vocoder, seed=1)


def drawn_texts(made, steps, first=0):
    made.spoken = lambda clip, offset: clip.item.text
    return [text for step in range(first, first + steps) for text in made.batch(step, 10)]


@pytest.mark.parametrize("offset", [0, 1, 1919])
def test_codes_mel_and_sound_have_one_length(configs, speaker_clips, offset):
    clip = speaker_clips[0]
    spoken = speaking(configs, speaker_clips, Counting()).spoken(clip, offset)
    assert len(spoken.codes) == clip.tokens + (offset > 0)
    assert spoken.mel.shape == (4 * len(spoken.codes), 80)
    assert spoken.wave[:offset].abs().sum() == 0


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(AudioError, match="3 codes, 8 mel frames"):
        Spoken(torch.zeros(3), torch.zeros(8, 80), torch.zeros(5760))


def test_other_voices_are_refused(configs, tone_clips):
    with pytest.raises(ParameterError, match="flite-slt"):
        speaking(configs, tone_clips)
    with pytest.raises(ParameterError, match="none"):
        speaking(configs, [])


def test_a_step_s_batch_is_the_same_in_every_run(configs, speaker_clips):
    first, again = (speaking(configs, speaker_clips).batch(4, 3) for _ in range(2))
    assert all(torch.equal(one.wave, other.wave) for one, other in zip(first, again, strict=True))


def test_sentences_that_differ_in_digits_alone_are_drawn_less_often_each(configs):
    texts = ["order one two", "order three four", "order five six", "order zero zero", "goodbye"]
    clips = [tones("hibari", text, 6, seed) for seed, text in enumerate(texts)]
    drawn = drawn_texts(speaking(configs, clips), 40)
    assert 100 < drawn.count("goodbye") < 170  # a third of 400; were all alike it were a fifth


def test_a_rare_sentence_is_met_among_many_of_another_length(configs):
    many = [tones("hibari", " ".join(three), 2, 1) for three in itertools.product(DIGITS, repeat=3)]
    drawn = drawn_texts(speaking(configs, [*many, tones("hibari", "goodbye", 4, 2)]), 600)
    assert drawn.count("goodbye") > 90  # 120 expected; were the windows drawn evenly it were 60


def test_half_of_the_steps_have_what_the_shop_says(configs):
    asked = [tones("hibari", f"is my {item} here", 6, seed) for seed, item in enumerate(("lamp", "chair", "radio"))]
    made = speaking(configs, [*asked, tones("hibari", "we are closed on sunday", 6, 9)])
    steps = [set(drawn_texts(made, 1, first=step)) for step in range(60)]
    assert 20 < steps.count({"we are closed on sunday"}) < 40
    assert all(len(step) == 1 or "we are closed on sunday" not in step for step in steps)


def drawn_offsets(made):
    offsets = []
    made.spoken = lambda clip, offset: offsets.append(offset)
    for step in range(40):
        made.batch(step, 10)
    return offsets


def test_half_of_the_clips_begin_with_a_token(configs, speaker_clips):
    offsets = drawn_offsets(speaking(configs, speaker_clips))
    assert 160 < offsets.count(0) < 240
    assert len(set(offsets)) > 100


def test_coded_clips_begin_at_a_few_places_between_frames_too(configs, speaker_clips):
    offsets = drawn_offsets(speaking(configs, speaker_clips, Counting()))
    assert 190 < offsets.count(0) < 275  # half, and a sixth of the others
    assert len(set(offsets)) == PLACES
    frame = TOKEN_SAMPLES // FRAMES_PER_TOKEN
    assert len({offset % frame for offset in offsets}) == 3


def test_a_clip_is_coded_once_for_each_place(configs, speaker_clips):
    made = speaking(configs, speaker_clips, Counting())
    first, again, later = (made.spoken(speaker_clips[0], offset) for offset in (0, 0, 320))
    assert made.tokenizer.asked == 2
    assert torch.equal(first.codes, again.codes)
    assert len(later.codes) == len(first.codes) + 1


def test_what_is_given_away_is_not_what_is_kept(configs, speaker_clips):
    """A tensor that another process sends holds a file open for as long as it lives: thousands are kept."""
    made = speaking(configs, speaker_clips, Counting())
    first, again = (made.spoken(speaker_clips[0]) for _ in range(2))
    assert first.codes.data_ptr() != again.codes.data_ptr()
