"""Seams with a vocoder that shows what happens to every sample: each mel frame becomes `HOP` equal samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia.model.crossfade import OverlapSeam, ReleaseSeam, Seam, cross_fade, rendered_mel

pytestmark = pytest.mark.unit

HOP = 10
OVERLAP = OverlapSeam(hold=8, context=16)


def ramp(frames: int) -> torch.Tensor:
    """A mel whose frames are all different."""
    return torch.arange(1.0, frames + 1)[:, None]


def stairs(mel: torch.Tensor) -> torch.Tensor:
    return mel[:, 0].repeat_interleave(HOP)


def run(seam: Seam, sizes: list[int], vocode=stairs) -> tuple[list[torch.Tensor], list]:
    """Chunks of one long mel through the seam: what is given out, and the tails."""
    tail, given_out, tails = None, [], []
    for index, mel in enumerate(ramp(sum(sizes)).split(sizes)):
        wave, tail = seam.join(vocode(rendered_mel(mel, tail)), mel, tail, index == len(sizes) - 1)
        given_out.append(wave)
        tails.append(tail)
    return given_out, tails


# ---- the release's law ------------------------------------------------------------------------------------------


def test_release_counts():
    """72, 120, 120, 120 committed frames, as pushes of 30 tokens give them."""
    waves, tails = run(ReleaseSeam(), [72, 120, 120, 120, 52])
    assert [wave.shape[0] for wave in waves] == [36 * HOP, 72 * HOP, 168 * HOP, 72 * HOP, (84 + 52) * HOP]
    assert [tail.mel.shape[0] for tail in tails[:-1]] == [36, 84, 36, 84]
    assert [tail.wave.shape[0] for tail in tails[:-1]] == [36 * HOP, 84 * HOP, 36 * HOP, 84 * HOP]
    assert tails[-1] is None


def test_release_seam_is_louder_by_eight_percent_and_not_at_the_end():
    waves, _ = run(ReleaseSeam(), [72, 120, 52])
    whole = stairs(ramp(72 + 120 + 52))
    expected = whole.clone()
    expected[36 * HOP : 72 * HOP] *= 1.08  # the half that the first chunk held back
    torch.testing.assert_close(torch.cat(waves), expected, rtol=1e-5, atol=0)


def test_release_fades_from_the_old_rendering_to_the_new():
    renderings = iter([torch.full((40 * HOP,), 1.0), torch.full((60 * HOP,), 2.0)])
    waves, _ = run(ReleaseSeam(), [40, 40], vocode=lambda _mel: next(renderings))
    assert (waves[1] == 2).all()  # final: no trace of the old rendering
    assert waves[1].shape[0] == 60 * HOP
    renderings = iter([torch.full((40 * HOP,), 1.0), torch.full((60 * HOP,), 2.0), torch.zeros(60 * HOP)])
    waves, _ = run(ReleaseSeam(), [40, 40, 40], vocode=lambda _mel: next(renderings))
    window = torch.hamming_window(40 * HOP)
    torch.testing.assert_close(waves[1][: 20 * HOP], window[20 * HOP :] + 2 * window[: 20 * HOP])
    assert (waves[1][20 * HOP :] == 2).all()


def test_release_loses_audio_when_chunks_shrink():
    waves, tails = run(ReleaseSeam(), [72, 120, 32, 24, 80])
    assert [wave.shape[0] for wave in waves] == [36 * HOP, 72 * HOP, 58 * HOP, 28 * HOP, 104 * HOP]
    assert tails[2].mel.shape[0] == 32  # of 58 held frames


def test_release_with_an_odd_number_of_frames():
    """Half a frame cannot be held, so five samples are rendered twice."""
    waves, tails = run(ReleaseSeam(), [7, 7, 7])
    assert [wave.shape[0] for wave in waves] == [35, 70, 110]
    assert [(tail.mel.shape[0], tail.wave.shape[0]) for tail in tails[:-1]] == [(4, 35), (4, 40)]
    assert tails[0].mel[0, 0] == 4


def test_release_gives_a_single_chunk_whole():
    waves, tails = run(ReleaseSeam(), [9])
    assert torch.equal(waves[0], stairs(ramp(9)))
    assert tails == [None]


# ---- the overlap ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=7), hold=st.integers(1, 20), context=st.integers(0, 30))
def test_overlap_loses_nothing_and_changes_nothing(sizes, hold, context):
    waves, tails = run(OverlapSeam(hold, context), sizes)
    torch.testing.assert_close(torch.cat(waves), stairs(ramp(sum(sizes))), rtol=1e-5, atol=0)
    for size, tail in zip(sizes, tails[:-1], strict=False):  # blended samples are given out, never blended again
        assert tail.wave.shape[0] == min(hold, size) * HOP


def test_overlap_has_gain_one_on_a_constant():
    waves, _ = run(OVERLAP, [24, 48, 96, 3, 30], vocode=lambda mel: torch.ones(mel.shape[0] * HOP))
    assert (torch.cat(waves) - 1).abs().max() < 1e-6


def test_overlap_counts_and_what_the_vocoder_sees():
    seen = []

    def vocode(mel: torch.Tensor) -> torch.Tensor:
        seen.append((int(mel[0, 0]), int(mel[-1, 0])))
        return stairs(mel)

    waves, tails = run(OVERLAP, [24, 48, 96, 5], vocode)
    assert [wave.shape[0] for wave in waves] == [16 * HOP, 48 * HOP, 96 * HOP, 13 * HOP]
    assert seen == [(1, 24), (1, 72), (49, 168), (145, 173)]  # 16 frames of context, 8 held, then the new ones
    assert [tail.wave.shape[0] for tail in tails[:-1]] == [8 * HOP] * 3


def test_overlap_fades_into_the_last_chunk_too():
    renderings = iter([torch.full((24 * HOP,), 1.0), torch.full((30 * HOP,), 2.0)])
    waves, _ = run(OVERLAP, [24, 6], vocode=lambda _mel: next(renderings))
    faded = waves[1][: 8 * HOP]
    assert (faded.diff() > 0).all()
    assert faded[0] == pytest.approx(1, abs=1e-2)
    assert faded[-1] == pytest.approx(2, abs=1e-2)
    assert (waves[1][8 * HOP :] == 2).all()


def test_overlap_flushes_without_a_new_frame():
    wave, tail = OVERLAP.join(stairs(ramp(24)), ramp(24), None, False)
    rest, none = OVERLAP.join(stairs(tail.mel), ramp(24)[:0], tail, True)
    assert torch.equal(torch.cat([wave, rest]), stairs(ramp(24)))
    assert none is None


def test_cross_fade_weights():
    faded = cross_fade(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0, 5.0]))
    assert faded.tolist() == pytest.approx([0.8535534, 0.1464466, 5.0])  # cos^2 of 22.5 and 67.5 degrees
