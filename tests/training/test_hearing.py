"""Batches: repeatable, aligned, with targets only where there are any."""

import numpy as np
import pytest
import torch

from training.augment import Chances
from training.hearing import EVENTS, FRAME_SAMPLES, NEIGHBOURS, Hearing, events_loss, lesson_loss, letters_loss
from training.scores import CLASSES
from training.smoke import tones
from training.teacher import TEACHER_WIDTH

pytestmark = pytest.mark.unit

SAME = Chances(resample=0, noise=0, phone=0, gain_db=(0, 0))
ALWAYS_FASTER = Chances(resample=1, noise=0, phone=0)


class Parrot:
    """A teacher whose state of a frame is the frame's loudness."""

    def __call__(self, clip):
        wave = clip.heard()
        frames = np.pad(wave, (0, -len(wave) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
        return torch.from_numpy(np.abs(frames).mean(1, keepdims=True)).expand(-1, TEACHER_WIDTH)


def hearing(configs, clips, teacher=None):
    return Hearing(clips, teacher, configs.vq_features, configs, seed=1)


def test_a_step_s_batch_is_the_same_in_every_run(configs, tone_clips):
    first, again = (hearing(configs, tone_clips).batch(5, 4) for _ in range(2))
    torch.testing.assert_close(first.mel, again.mel, rtol=0, atol=0)
    assert first.letters.tolist() == again.letters.tolist()
    assert not torch.equal(first.mel, hearing(configs, tone_clips).batch(6, 4).mel)


def test_neighbours_of_one_length_are_of_all_voices(configs):
    listed = [tones(voice, "yes", 6, n) for voice in ("hibari", "flite-slt") for n in range(NEIGHBOURS)]
    voices = [clip.item.voice for clip in hearing(configs, listed).clips[:NEIGHBOURS]]
    assert 0.3 < voices.count("hibari") / NEIGHBOURS < 0.7


def test_shapes_fit_together(configs, tone_clips):
    batch = hearing(configs, tone_clips).batch(0, 4, SAME)
    frames = batch.taught.shape[1]
    assert batch.mel.shape == (4, 80, 2 * frames)
    assert batch.spoken.shape == (4, frames, 80)
    assert batch.frames.sum(1).tolist() == [-(-samples // FRAME_SAMPLES) for samples in batch.samples.tolist()]
    assert len(batch.letters) == batch.letter_counts.sum()


def test_only_the_speaking_voice_has_a_mel_to_draw(configs, tone_clips):
    made = hearing(configs, tone_clips)
    callers = [clip for clip in tone_clips if clip.item.voice != "hibari"]
    assert all(made.speech_target(clip) is None for clip in callers)
    assert not hearing(configs, callers).batch(0, 4).spoken_frames.any()
    speaker = [clip for clip in tone_clips if clip.item.voice == "hibari"]
    batches = [hearing(configs, speaker).batch(step, 4, ALWAYS_FASTER) for step in range(8)]
    drawn = torch.cat([batch.spoken_frames.any(1) for batch in batches])
    assert drawn.any()
    assert not drawn.all()  # what is sped up has lost its target
    assert all(batch.spoken[~batch.spoken_frames].abs().sum() == 0 for batch in batches)


def test_lessons_follow_the_changed_pace(configs, tone_clips):
    made = hearing(configs, tone_clips[1:2], Parrot())
    batch = made.batch(0, 1, ALWAYS_FASTER)
    assert made.clips[0].item.voice == "flite-slt"
    taught = batch.taught[0, batch.frames[0], 0]
    assert (taught > 0).all()
    assert len(taught) != made.clips[0].tokens * 4


def test_the_lesson_is_learned_by_saying_what_the_teacher_said(configs, tone_clips):
    batch = hearing(configs, tone_clips, Parrot()).batch(0, 8, SAME)
    noisy = torch.randn(batch.taught.shape, generator=torch.Generator().manual_seed(0))
    heard = batch.taught[batch.taught_frames]
    perfect = batch.taught - heard.mean(0)
    assert lesson_loss(perfect, batch) == pytest.approx(0.0, abs=1e-5)
    assert lesson_loss(noisy, batch) > 0.5


def test_without_a_lesson_nothing_is_lost(configs, tone_clips):
    batch = hearing(configs, tone_clips).batch(0, 4)
    guessed = torch.ones(batch.taught.shape, requires_grad=True)
    loss = lesson_loss(guessed, batch)
    loss.backward()
    assert loss == 0


def test_letters_cost_nothing_when_they_stand_in_the_frames(configs, tone_clips):
    batch = hearing(configs, tone_clips).batch(0, 3, SAME)
    logits = torch.zeros(*batch.taught.shape[:2], CLASSES)
    logits[..., 0] = 50.0
    place = 0
    for row, count in enumerate(batch.letter_counts.tolist()):
        for position, letter in enumerate(batch.letters[place : place + count].tolist()):
            logits[row, 2 * position] = 0.0
            logits[row, 2 * position, letter] = 50.0
        place += count
    assert letters_loss(logits, batch) == pytest.approx(0.0, abs=1e-3)
    assert letters_loss(torch.zeros_like(logits), batch) > 1


def test_windows_are_whole_segments_of_clips_and_sounds(configs, tone_clips):
    made = hearing(configs, tone_clips, Parrot())
    batches = [made.windows(step, 4, SAME) for step in range(6)]
    for batch in batches:
        assert batch.mel.shape == (4, 80, 800)
        assert (batch.samples <= 128000).all()
        assert (batch.events[~batch.frames] == -1).all()
        assert len(batch.letters) == batch.letter_counts.sum()
    events = torch.cat([batch.events.flatten() for batch in batches])
    assert set(events.tolist()) > {-1, 0}
    assert int(events.max()) < len(EVENTS)


def test_a_window_s_targets_stand_where_its_pieces_sound(configs, tone_clips):
    batch = hearing(configs, tone_clips, Parrot()).windows(3, 8, SAME)
    loud = batch.mel[:, :, ::2].amax(1) > batch.mel.mean((1, 2))[:, None]  # (B, J)
    speech = batch.events == 0
    assert loud[speech].float().mean() > 0.9
    assert (batch.taught[batch.taught_frames] > 0.01).float().mean() > 0.9
    assert speech[batch.taught_frames].all()
    assert speech[batch.spoken_frames].all()


def test_the_same_step_gives_the_same_windows(configs, tone_clips):
    first, again = (hearing(configs, tone_clips).windows(2, 3) for _ in range(2))
    torch.testing.assert_close(first.mel, again.mel, rtol=0, atol=0)


def test_events_that_are_known_cost_nothing(configs, tone_clips):
    batch = hearing(configs, tone_clips).windows(0, 4, SAME)
    exact = 50.0 * torch.nn.functional.one_hot(batch.events.clamp(min=0), len(EVENTS))
    assert events_loss(exact, batch) == pytest.approx(0.0, abs=1e-4)
    assert events_loss(torch.zeros_like(exact), batch) > 1
