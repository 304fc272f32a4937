"""Streaming synthesis against golden streams, and its rules on a small random model."""

from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kimia.errors import AudioError, ConfigError, ParameterError
from kimia.model import philox
from kimia.model.bigvgan import mel_spectrogram
from kimia.model.checkpoint import open_checkpoint
from kimia.model.chunking import ChunkPlanner, Push, pushes
from kimia.model.crossfade import ReleaseSeam
from kimia.model.detokenize import Detokenizer, Report, Synthesis
from kimia.model.flow import time_grid
from kimia.model.flow_engine import FlowEngine
from kimia.model.presets import LOW_LATENCY, UPSTREAM, Preset
from tests.golden_data import golden, golden_json
from tests.model.tiny_detokenizer import (
    FLOW,
    VOCODER,
    PlainDiT,
    counted_noise,
    golden_cases,
    random_detokenizer,
    random_dit,
    random_vocoder,
)

pytestmark = pytest.mark.parity

QUICK = replace(LOW_LATENCY, ode_points=3)
QUICK_UPSTREAM = replace(UPSTREAM, ode_points=3)


@pytest.fixture(scope="module")
def small() -> Detokenizer:
    return random_detokenizer()


def codes(count: int, start: int = 0) -> list[int]:
    return [(start + 3 * index) % FLOW.audio_codes for index in range(count)]


def spoken(synthesis: Synthesis, preset: Preset, count: int) -> torch.Tensor:
    return torch.cat([synthesis.push(push.tokens, push.final) for push in pushes(preset, codes(count))])


# ---- golden streams ---------------------------------------------------------------------------------------------


def loaded(folder) -> Detokenizer:
    parts: Any = SimpleNamespace(flow=folder / "audio_detokenizer", vocoder=folder / "vocoder")
    return Detokenizer.load(parts, "cpu", torch.float32)


@pytest.fixture(scope="module")
def golden_detokenizer() -> Detokenizer:
    return loaded(golden("detokenizer") / "checkpoint")


def as_float(stored: torch.Tensor) -> torch.Tensor:
    return stored.float() / 32767 if stored.dtype == torch.int16 else stored.float()


def golden_preset(case: dict[str, Any]) -> Preset:
    return replace(
        UPSTREAM,
        look_ahead=case["look_ahead_tokens"],
        ode_points=case["ode_step"],
        solver=case["solver"],
        kv_window=case["max_kv_cache_tokens"],
        max_positions=case["max_pos_size"],
    )


def golden_prefill(synthesis: Synthesis, prefill: dict[str, Any], stream: dict[str, torch.Tensor]) -> None:
    file, _, rest = prefill["wav"].partition(":")
    name, _, samples = rest.partition("[:")
    wave = as_float(load_file(golden("detokenizer") / file)[name])[: int(samples.partition("]")[0])]
    synthesis.prefill(wave, stream["prefill.tokens_50hz"].tolist(), prefill["chunk_size"])
    assert synthesis.position == prefill["start_position_after"]
    assert synthesis.kv_frames == prefill["kv_tokens_after"]


def counters(synthesis: Synthesis) -> dict[str, int]:
    """The report under the golden set's names."""
    fields = {name: value for name, value in vars(synthesis.report).items() if name not in ("mel", "committed")}
    return {"kv_tokens_after" if name == "kv_frames_after" else name: value for name, value in fields.items()}


STREAMS = [case for case in golden_cases("detokenizer", "goldens.json") if case["name"] != "prefill_reset_upstream"]


@pytest.mark.parametrize("case", STREAMS, ids=lambda case: case["name"])
def test_golden_stream(case, golden_detokenizer):
    """All but the stream whose second reset restores a damaged prompt. Lost audio is the upstream preset's own."""
    tolerance = golden_json("detokenizer", "goldens.json")["tolerances_float32"]
    stream = load_file(golden("detokenizer") / case["file"])
    detokenizer = replace(golden_detokenizer, upsample=case["upsample"])
    synthesis = detokenizer.stream(
        golden_preset(case), seed=0, noise=lambda chunk, _shape: stream[f"chunk{chunk}.noise"].float()
    )
    if case["prefill"]:
        golden_prefill(synthesis, case["prefill"], stream)
    slices = stream["tokens"].split(case["chunks"])
    for index, (tokens, expected) in enumerate(zip(slices, case["per_chunk"], strict=True)):
        wave = synthesis.push(tokens.tolist(), final=index == len(slices) - 1)
        assert counters(synthesis) == expected
        torch.testing.assert_close(
            synthesis.report.mel, stream[f"chunk{index}.mel"], atol=tolerance["mel"], rtol=0, check_dtype=True
        )
        if f"chunk{index}.wav" in stream:
            expected_wave = as_float(stream[f"chunk{index}.wav"])
            torch.testing.assert_close(wave, expected_wave, atol=tolerance["wav"], rtol=0)


ANSWERS = [case for case in golden_cases("e2e", "cases.json") if case["file"]]


@pytest.fixture(scope="module")
def answering_detokenizer() -> Detokenizer:
    return loaded(golden("e2e") / golden_json("e2e", "cases.json")["model"])


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case["name"])
def test_golden_answer(case, answering_detokenizer):
    stored = load_file(golden("e2e") / case["file"])
    synthesis = answering_detokenizer.stream(
        UPSTREAM, seed=0, noise=lambda chunk, _shape: stored[f"chunk{chunk}.noise"].float()
    )
    made, waves = list(pushes(UPSTREAM, case["audio_codes"])), []
    for push, expected in zip(made, case["chunks"], strict=True):
        waves.append(synthesis.push(push.tokens, push.final))
        got = {"tokens": len(push.tokens), "is_final": push.final, "samples": waves[-1].shape[0]}
        assert got == expected
    torch.testing.assert_close(torch.cat(waves), as_float(stored["wav"]), atol=1e-4, rtol=0)


# ---- one push, written out --------------------------------------------------------------------------------------


def test_a_stream_is_the_plain_one(small):
    """Two pushes by the plain velocity field: noise, look-ahead, commit pass, window and de-normalisation."""
    preset = replace(QUICK, look_ahead=2, kv_window=13)
    synthesis = small.stream(preset, seed=0, noise=counted_noise)
    plain, grid, ids = PlainDiT(small.dit), time_grid(3), codes(9)

    def solved(chunk: int, tokens: list[int], start: int, past: list | None) -> torch.Tensor:
        frames = [token for token in tokens for _ in range(4)]
        x = counted_noise(chunk, (len(frames), FLOW.mel_bins)).double()
        for index, size in zip(grid.indices, grid.sizes, strict=True):
            x = x + size * torch.from_numpy(plain(x, frames, index, start, past)[0])
        return x

    first = solved(0, ids[:6], 0, None)[:16]
    _, past = plain(first, [token for token in ids[:4] for _ in range(4)], 999, 0)
    past = [[(keys[-13:], values[-13:]) for keys, values in heads] for heads in past]
    second = solved(1, ids[4:], 16, past)
    for tokens, final, expected in ((ids[:6], False, first), (ids[6:], True, second)):
        synthesis.push(tokens, final)
        np.testing.assert_allclose(synthesis.report.mel.numpy(), expected.numpy() * 2.0 - 1.5, atol=2e-4)


def test_without_look_ahead_the_last_step_is_remembered(small):
    """As the release does: no commit pass, so the prefix is that of the last evaluation."""
    preset = replace(QUICK, look_ahead=0, ode_points=2)
    synthesis = small.stream(preset, seed=0, noise=counted_noise)
    synthesis.push(codes(3))
    _, heard = PlainDiT(small.dit)(
        counted_noise(0, (12, FLOW.mel_bins)), [token for token in codes(3) for _ in range(4)], 0, 0
    )
    kept = synthesis._state.heard.cache.held
    np.testing.assert_allclose(kept.keys[1, 0, 2].numpy(), heard[1][2][0], atol=1e-4)
    assert synthesis.push([], final=True).shape[0] == 8 * VOCODER.hop  # only what the seam held


# ---- lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [QUICK, QUICK_UPSTREAM], ids=lambda preset: preset.name)
@pytest.mark.parametrize("count", [1, 5, 11, 12, 13, 29, 30, 31, 60, 61, 130])
def test_every_token_becomes_its_samples(preset, count, small):
    assert small.synthesize(codes(count), preset, seed=1).shape == (count * small.samples_per_token,)


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(0, 90), commits=st.lists(st.integers(1, 20), min_size=1, max_size=3), upsample=st.integers(1, 4)
)
def test_low_latency_loses_nothing_whatever_the_plan(count, commits, upsample):
    preset = replace(QUICK, commits=tuple(commits), ode_points=2)
    detokenizer = random_detokenizer(upsample)
    assert detokenizer.synthesize(codes(count), preset, 1).shape == (count * VOCODER.hop * upsample,)


def test_a_turn_ends_with_its_final_push(small):
    synthesis = small.stream(QUICK, seed=1)
    synthesis.push(codes(10))
    synthesis.push(codes(3), final=True)
    for tokens, final in ((codes(10), False), (codes(3), True), ([], True)):
        with pytest.raises(ParameterError, match="final push"):
            synthesis.push(tokens, final)


def test_no_codes_are_no_audio(small):
    for preset in (QUICK, QUICK_UPSTREAM):
        wave = small.synthesize([], preset, seed=1)
        assert wave.shape == (0,)
        assert wave.dtype == torch.float32
    synthesis = small.stream(QUICK, seed=1)
    assert synthesis.push([], final=True).shape == (0,)
    with pytest.raises(ParameterError, match="final push"):
        synthesis.push([1], final=True)


def test_an_empty_final_push_brings_out_the_look_ahead(small):
    synthesis = small.stream(QUICK, seed=1)
    first = synthesis.push(codes(10))
    rest = synthesis.push([], final=True)
    assert first.shape[0] == 16 * VOCODER.hop
    assert first.shape[0] + rest.shape[0] == 10 * small.samples_per_token
    assert synthesis.report.frames_in == 16


# ---- randomness -------------------------------------------------------------------------------------------------


def test_streaming_is_the_whole_bit_for_bit(small):
    for preset in (QUICK, QUICK_UPSTREAM):
        whole = small.synthesize(codes(70), preset, seed=7)
        assert torch.equal(spoken(small.stream(preset, seed=7), preset, 70), whole)


def test_noise_is_a_function_of_seed_and_chunk(small):
    asked = []

    def noise(chunk: int, shape: tuple[int, int]) -> torch.Tensor:
        asked.append((chunk, shape))
        return torch.from_numpy(philox.normal(7, chunk, shape))

    wave = small.synthesize(codes(40), QUICK, seed=7)
    assert torch.equal(wave, small.synthesize(codes(40), QUICK, seed=0, noise=noise))
    assert asked == [(0, (40, 5)), (1, (64, 5)), (2, (88, 5))]  # (22 + 18 codes) x 4: look-ahead drawn anew
    assert not torch.equal(wave, small.synthesize(codes(40), QUICK, seed=8))


def test_two_turns_do_not_meet(small):
    alone = [small.synthesize(codes(40, start), QUICK, seed) for start, seed in ((0, 3), (5, 4))]
    turns = [small.stream(QUICK, 3), small.stream(QUICK, 4)]
    plans = [list(pushes(QUICK, codes(40, start))) for start in (0, 5)]
    waves: list[list[torch.Tensor]] = [[], []]
    for pair in zip(*plans, strict=True):
        for turn, push in enumerate(pair):
            waves[turn].append(turns[turn].push(push.tokens, push.final))
    for turn in range(2):
        assert torch.equal(torch.cat(waves[turn]), alone[turn])


@pytest.mark.parametrize("seed", [-1, 2**63, True])
def test_illegal_seeds_are_refused(seed, small):
    with pytest.raises(ParameterError, match="seed"):
        small.stream(QUICK, seed)


# ---- positions --------------------------------------------------------------------------------------------------


def test_upstream_forgets_by_the_release_rule(small):
    """After a chunk at which start + 2 x committed passes the limit; what is held back survives."""
    preset = replace(QUICK_UPSTREAM, max_positions=216)
    synthesis, after = small.stream(preset, seed=1), []
    waves = []
    for push in pushes(preset, codes(130)):
        waves.append(synthesis.push(push.tokens, push.final))
        after.append((synthesis.report.next_start_position, synthesis.report.kv_frames_after))
    # 72 + 144 reaches 216 and does not pass it; 192 + 240 and then 120 + 240 do
    assert after == [(72, 72), (0, 0), (0, 0), (0, 0), (0, 0)]
    assert torch.cat(waves).shape[0] == 130 * small.samples_per_token


def test_growing_chunks_never_leave_the_position_table(small):
    """72 + 240 <= 400 would satisfy the release's rule, 24 + 48 + 4 x (90 + 4) frames would not fit the table."""
    preset = replace(QUICK, commits=(6, 12, 90))
    synthesis, spans = small.stream(preset, seed=1), []
    for push in pushes(preset, codes(250)):
        synthesis.push(push.tokens, push.final)
        spans.append((synthesis.report.start_position, synthesis.report.frames_in))
    assert [start for start, _ in spans] == [0, 24, 0, 0, 0]
    assert all(start + frames <= FLOW.max_positions for start, frames in spans)


def test_positions_grow_while_the_window_is_full(small):
    preset = replace(QUICK, kv_window=50)
    synthesis = small.stream(preset, seed=1)
    made = list(pushes(preset, codes(90)))
    kept = []
    for push in made[:-1]:
        synthesis.push(push.tokens, push.final)
        kept.append((synthesis.position, synthesis.kv_frames))
    assert kept == [(24, 24), (72, 50), (168, 50), (316, 50)]


def test_a_push_beyond_all_positions_is_refused(small):
    synthesis = small.stream(QUICK, seed=1)
    with pytest.raises(ParameterError, match="400 positions"):
        synthesis.push(codes(101), final=True)
    assert synthesis.push(codes(100), final=True).shape[0] == 100 * small.samples_per_token


# ---- refusals leave the state alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, FLOW.audio_codes, FLOW.audio_codes + 5])
def test_illegal_ids_are_refused(token, small):
    """The id right behind the codes has an embedding row, that of classifier-free guidance: refused as well."""
    with pytest.raises(ParameterError, match=r"token 1 is .*0\.\.10"):
        small.stream(QUICK, seed=1).push([3, token], final=True)


def test_ids_must_be_integers(small):
    with pytest.raises(ParameterError, match="integers"):
        small.stream(QUICK, seed=1).push([1.5], final=True)
    small.stream(QUICK, seed=1).push(np.array([1, 2]), final=True)


def test_a_chunk_must_exceed_its_look_ahead(small):
    synthesis = small.stream(QUICK, seed=1)
    for count in (0, 1, 4):
        with pytest.raises(ParameterError, match="at least 5 tokens"):
            synthesis.push(codes(count))
    synthesis.push(codes(5))
    with pytest.raises(ParameterError, match="at least 1 tokens"):
        synthesis.push([])
    synthesis.push(codes(1))


@pytest.mark.parametrize("broken", ["noise", "vocoder"])
def test_a_failed_push_can_be_repeated(broken, monkeypatch):
    detokenizer = random_detokenizer()
    expected = detokenizer.synthesize(codes(40), QUICK, seed=0, noise=counted_noise)
    failing = {"now": False}

    def noise(chunk: int, shape: tuple[int, int]) -> torch.Tensor:
        if failing["now"] and broken == "noise":
            raise OSError("no noise today")
        return counted_noise(chunk, shape)

    def check(_module, _inputs) -> None:
        if failing["now"] and broken == "vocoder":
            raise OSError("out of memory, say")

    detokenizer.vocoder.register_forward_pre_hook(check)
    synthesis, waves = detokenizer.stream(QUICK, seed=0, noise=noise), []
    for push in pushes(QUICK, codes(40)):
        failing["now"] = True
        before = (synthesis.report, synthesis.position, synthesis.kv_frames)
        with pytest.raises(OSError):  # noqa: PT011
            synthesis.push(push.tokens, push.final)
        assert before == (synthesis.report, synthesis.position, synthesis.kv_frames)
        failing["now"] = False
        waves.append(synthesis.push(push.tokens, push.final))
    assert torch.equal(torch.cat(waves), expected)


def test_noise_of_another_shape_is_refused(small):
    synthesis = small.stream(QUICK, seed=1, noise=lambda _chunk, _shape: torch.zeros(3, 5))
    with pytest.raises(ParameterError, match=r"\(40, 5\)"):
        synthesis.push(codes(10))


def test_parts_must_fit_together():
    with pytest.raises(ConfigError, match="6 mel bins"):
        Detokenizer(random_dit(replace(FLOW, mel_bins=6)), random_vocoder())


# ---- going on elsewhere -----------------------------------------------------------------------------------------


Made = tuple[Push, torch.Tensor | None, torch.Tensor]  # a push, what it committed, its samples

FORGETFUL = [
    QUICK,
    QUICK_UPSTREAM,
    replace(QUICK, kv_window=50),
    replace(QUICK, commits=(6, 12, 90)),  # runs out of the model's positions
    replace(QUICK_UPSTREAM, max_positions=216),  # forgets behind nearly every chunk
    replace(QUICK_UPSTREAM, max_positions=390, kv_window=100),
    replace(QUICK, commits=(1, 2, 30), look_ahead=1),  # the first chunk gives out nothing
]


def made_by(synthesis: Synthesis, preset: Preset, count: int) -> list[Made]:
    made = []
    for push in pushes(preset, codes(count)):
        samples = synthesis.push(push.tokens, push.final)
        made.append((push, synthesis.report.committed, samples))
    return made


def restored(synthesis: Synthesis, made: list[Made]) -> Synthesis:
    synthesis.restore([push for push, _, _ in made], [x for _, x, _ in made])
    return synthesis


def counted(counts: Counter[str], function: Any) -> Any:
    def call(*args: Any) -> Any:
        counts[function.__name__] += 1
        return function(*args)

    return call


def same(one: Report, other: Report) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Report)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("preset", FORGETFUL)
def test_a_restored_turn_goes_on_bit_for_bit(preset, small, monkeypatch):
    """Behind every push: no ODE step, one commit per push at most, one rendering; then the undisturbed turn."""
    made = made_by(small.stream(preset, seed=1), preset, 150)
    for begin in range(1, len(made)):
        again, counts = small.stream(preset, seed=1), Counter()
        with monkeypatch.context() as patch:
            patch.setattr(FlowEngine, "advance", lambda *_: pytest.fail("solved"))
            patch.setattr(FlowEngine, "commit", counted(counts, FlowEngine.commit))
            patch.setattr(type(small.vocoder), "forward", counted(counts, type(small.vocoder).forward))
            restored(again, made[:begin])
        assert counts["commit"] <= begin
        assert counts["forward"] == 1
        undisturbed = small.stream(preset, seed=1)
        for push, _, _ in made[:begin]:
            undisturbed.push(push.tokens, push.final)
        for push, _, samples in made[begin:]:
            assert torch.equal(again.push(push.tokens, push.final), samples)
            undisturbed.push(push.tokens, push.final)
            assert same(again.report, undisturbed.report)


def test_only_what_is_still_heard_is_committed_again(small, monkeypatch):
    preset = replace(QUICK_UPSTREAM, max_positions=390)  # forgets behind every other chunk
    synthesis, made, positions = small.stream(preset, seed=1), [], []
    for push in pushes(preset, codes(200)):
        samples = synthesis.push(push.tokens, push.final)
        made.append((push, synthesis.report.committed, samples))
        positions.append(synthesis.position)
    counts: Counter[str] = Counter()
    monkeypatch.setattr(FlowEngine, "commit", counted(counts, FlowEngine.commit))
    commits = []
    for count in range(1, len(made)):
        counts.clear()
        assert restored(small.stream(preset, seed=1), made[:count]).position == positions[count - 1]
        commits.append(counts["commit"])
    assert positions[:4] == [72, 0, 120, 0]
    assert commits[:4] == [1, 0, 1, 0]


def test_a_turn_is_restored_behind_its_prompt(small):
    made = made_by(prompted(small, QUICK_UPSTREAM, 40, 15), QUICK_UPSTREAM, 90)
    again = restored(prompted(small, QUICK_UPSTREAM, 40, 15), made[:2])
    for push, _, samples in made[2:]:
        assert torch.equal(again.push(push.tokens, push.final), samples)


def test_what_cannot_be_restored_is_refused(small):
    made = made_by(small.stream(QUICK, seed=1), QUICK, 40)
    tokens, mels = [push for push, _, _ in made[:2]], [x for _, x, _ in made[:2]]
    with pytest.raises(ParameterError, match="push 1 cannot have committed"):
        small.stream(QUICK, seed=1).restore(tokens, [mels[0], mels[0]])
    with pytest.raises(ParameterError, match="push 0 cannot have committed"):
        small.stream(QUICK, seed=1).restore([Push((), final=True)], [torch.empty(0, FLOW.mel_bins)])
    begun = small.stream(QUICK, seed=1)
    begun.push(tokens[0].tokens)
    with pytest.raises(ParameterError, match="has not begun"):
        begun.restore(tokens, mels)
    blind = replace(QUICK, look_ahead=0)
    synthesis = small.stream(blind, seed=1)
    synthesis.push(codes(6))
    assert synthesis.report.committed is None  # what is remembered is the last ODE step's
    with pytest.raises(ParameterError, match="look-ahead"):
        small.stream(blind, seed=1).restore([Push(tuple(codes(6)), final=False)], [synthesis.report.mel])


# ---- timbre -----------------------------------------------------------------------------------------------------


def prompt_wave(frames: int) -> torch.Tensor:
    return 0.1 * torch.randn(frames * VOCODER.hop, generator=torch.Generator().manual_seed(9))


def prompted(detokenizer: Detokenizer, preset: Preset, frames: int, chunk: int) -> Synthesis:
    synthesis = detokenizer.stream(preset, seed=1)
    synthesis.prefill(prompt_wave(frames), codes(frames), chunk)
    return synthesis


@pytest.mark.parametrize(
    ("frames", "chunk", "expected"),
    [
        (23, 10, [3, 10, 10]),
        (20, 10, [10, 10]),  # the release fails on an empty odd chunk
        (7, 10, [7]),
        (27, 2, [7] + [2] * 10),  # at most ten full chunks
    ],
)
def test_prompt_enters_in_chunks(frames, chunk, expected, small, monkeypatch):
    """The odd chunk first; each attends to those before it, at t = 999, on the normalised mel."""
    plain = PlainDiT(small.dit)
    synthesis = prompted(small, QUICK, frames, chunk)
    mel = (mel_spectrogram(prompt_wave(frames), VOCODER) - FLOW.mel_mean) / FLOW.mel_std
    past, bounds = None, [0, *np.cumsum(expected)]
    for start, stop in pairwise(bounds):
        _, past = plain(mel[start:stop], codes(frames)[start:stop], 999, start, past)
    kept = synthesis._state.heard.cache.held
    assert synthesis.position == synthesis.kv_frames == frames
    np.testing.assert_allclose(kept.keys[1, 0, 1].numpy(), past[1][1][0], atol=2e-4)
    np.testing.assert_allclose(kept.values[1, 0, 1].numpy(), past[1][1][1], atol=2e-4)


def test_prompt_changes_the_voice_and_outlives_resets(small):
    preset = replace(QUICK_UPSTREAM, max_positions=300)
    synthesis = prompted(small, preset, 40, 15)
    kept = synthesis._state.prompt.prefix.keys.clone()
    starts, waves = [], []
    for push in pushes(preset, codes(160)):
        waves.append(synthesis.push(push.tokens, push.final))
        starts.append(synthesis.report.start_position)
    assert starts == [40, 112, 40, 40, 40, 40]  # reset several times, always to the end of the prompt
    assert torch.equal(synthesis._state.prompt.prefix.keys, kept)
    assert not torch.equal(torch.cat(waves), small.synthesize(codes(160), preset, seed=1))


def test_the_prompt_does_not_reach_other_turns(small):
    before = small.synthesize(codes(20), QUICK, seed=1)
    prompted(small, QUICK, 40, 15)
    assert torch.equal(small.synthesize(codes(20), QUICK, seed=1), before)


@pytest.mark.parametrize("preset", [QUICK, QUICK_UPSTREAM], ids=lambda preset: preset.name)
def test_a_short_waveform_is_padded(preset, small):
    synthesis = small.stream(preset, seed=1)
    padded = synthesis._prompt_mel(prompt_wave(6), 8)
    value = (preset.prompt_padding - FLOW.mel_mean) / FLOW.mel_std
    assert padded[6:].flatten().tolist() == pytest.approx([value] * 2 * FLOW.mel_bins)
    torch.testing.assert_close(synthesis._prompt_mel(prompt_wave(6), 4), padded[:4], atol=1e-5, rtol=0)


def test_illegal_prompts_are_refused(small):
    synthesis = small.stream(QUICK, seed=1)
    for wave, ids, chunk, error in (
        (prompt_wave(8), [], 4, ParameterError),
        (prompt_wave(8), codes(FLOW.max_positions), 4, ParameterError),
        (prompt_wave(8), codes(8), 0, ParameterError),
        (prompt_wave(8), [FLOW.audio_codes], 4, ParameterError),
        (prompt_wave(8)[:3], codes(8), 4, AudioError),
    ):
        with pytest.raises(error):
            synthesis.prefill(wave, ids, chunk)
    assert synthesis.kv_frames == 0
    synthesis.push(codes(10))
    with pytest.raises(ParameterError, match="before the first push"):
        synthesis.prefill(prompt_wave(8), codes(8))


# ---- quirks of the release ----------------------------------------------------------------------------------------


def test_only_upstream_is_louder_at_the_seams(small, monkeypatch):
    """A vocoder that always says 0.5 shows the gain of every seam."""
    monkeypatch.setattr(
        type(small.vocoder), "forward", lambda _self, mel: torch.full((1, mel.shape[2] * VOCODER.hop), 0.5)
    )
    quiet, loud = (small.synthesize(codes(70), preset, seed=1) for preset in (QUICK, QUICK_UPSTREAM))
    assert (quiet - 0.5).abs().max() < 1e-6
    assert loud.max().item() == pytest.approx(0.54, abs=1e-5)
    assert isinstance(QUICK_UPSTREAM.seam, ReleaseSeam)


def test_sizes_come_from_the_configs(small):
    assert small.sample_rate == VOCODER.sample_rate
    assert small.samples_per_token == VOCODER.hop * 4
    assert small.codes == FLOW.audio_codes


def test_the_vocoder_is_float32_whatever_the_flow_model_is(tiny):
    detokenizer = Detokenizer.load(open_checkpoint(tiny), "cpu", torch.bfloat16)
    assert {p.dtype for p in detokenizer.dit.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in detokenizer.vocoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("preset", [QUICK, QUICK_UPSTREAM], ids=["low-latency", "upstream"])
def test_speech_goes_as_far_as_the_schedule_says(small, preset):
    synthesis, planner, samples = small.stream(preset, seed=1), ChunkPlanner(preset), 0
    for count, code in enumerate(codes(160), 1):
        push = planner.feed(code)
        if push:
            samples += len(synthesis.push(push.tokens, push.final))
        assert samples == preset.spoken(count) * small.samples_per_token
