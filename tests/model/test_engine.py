"""The engine against its plain twin, and against itself: alone, in company, interrupted."""

import dataclasses
import math
import random

import pytest
import torch

from kimia.errors import AudioError, ConfigError, NumericsError, ParameterError
from kimia.model.engine import Answer, Engine, part
from kimia.model.fused import Wanted
from kimia.model.generate import GenerateOptions, Step, generate
from kimia.model.lm import DualTrackLM, Row, load_lm, stack
from kimia.model.philox import Track
from kimia.model.sampler import Sampling
from tests.golden_data import golden
from tests.model.test_generate import CASES, RUNS, golden_prompt, track_tokens
from tests.model.tiny_lm import BLANK, CONFIG, TOKENS, WIDE, random_lm, random_row

pytestmark = pytest.mark.parity

SAMPLED = Sampling.from_arguments(
    {
        "text_temperature": 1.0,
        "text_top_k": 0,
        "audio_temperature": 1.2,
        "audio_top_k": 12,
        "text_repetition_penalty": 1.2,
        "text_repetition_window_size": 3,
        "audio_repetition_penalty": 1.3,
        "audio_repetition_window_size": 4,
    }
)
PROMPT = random_row(90, seed=11, segments=((2, 3), (40, 30)))


@pytest.fixture(scope="module")
def lm() -> DualTrackLM:
    return random_lm(WIDE, seed=3)


@pytest.fixture(scope="module")
def engine(lm: DualTrackLM) -> Engine:
    return Engine(lm, rows=5)


def options(output_type="both", max_steps=25, **more) -> GenerateOptions:
    return GenerateOptions(output_type, max_steps, **{"sampling": SAMPLED, **more})


def begun(engine: Engine, prompt: Row = PROMPT, **more) -> Answer:
    answer = engine.begin(prompt, TOKENS, options(**more))
    while answer.waits_for_prefill:
        engine.prefill(answer)
    return answer


def run(engine: Engine, answers: list[Answer]) -> list[list[Step]]:
    """All steps of each, always together as far as they go."""
    steps: list[list[Step]] = [[] for _ in answers]
    while going := [place for place, answer in enumerate(answers) if not answer.over]:
        for place, step in zip(going, engine.step([answers[place] for place in going]), strict=True):
            assert isinstance(step, Step)
            steps[place].append(step)
    return steps


def ids(steps: list[Step]) -> list[tuple[int, int]]:
    return [(step.text_id, step.audio_id) for step in steps]


# ---- against the twin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("more", [{}, {"output_type": "text"}, {"forced_text": (7, 8, 9)}], ids=["both", "text", "say"])
def test_ids_are_those_of_the_plain_loop(more, seed, engine, lm):
    [steps] = run(engine, [begun(engine, seed=seed, **more)])
    twin = list(generate(lm, PROMPT, TOKENS, options(seed=seed, **more)))
    assert ids(steps) == ids(twin)
    assert steps[-1].stop == twin[-1].stop


def test_logits_are_those_of_the_plain_network(engine, lm):
    answer, cache = begun(engine), lm.new_cache(rows=1)
    expected = lm(stack([PROMPT], lm.device), cache)
    for step in range(6):
        text, audio = engine._fused.step([answer.feed()], Wanted(text=True, audio=True))
        torch.testing.assert_close(text[0], expected.text_logits[0, -1], atol=5e-5, rtol=0)
        torch.testing.assert_close(audio[0], expected.audio_logits[0, -1], atol=5e-5, rtol=0)
        answer._feed = (50, step)
        expected = lm(stack([Row((50,), (step,))], lm.device), cache)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not any(case["is_continuous_mask"])])
def test_golden_conversation(name):
    """The end-to-end cases that need no encoder; `tests/services/test_chain.py` has the others."""
    case = CASES[name]
    folder = golden("e2e") / "model"
    lm = load_lm(folder, device="cpu", dtype=torch.float32)
    numbers = case["uniforms"]
    wanted = GenerateOptions(
        case["output_type"],
        case["max_new_tokens"],
        Sampling.from_arguments(case["sampling"]),
        uniforms=None if numbers is None else lambda track, step: numbers[2 * step + int(track)],
    )
    engine = Engine(lm, rows=4)
    answer = engine.begin(Row(case["prompt_audio_ids"], case["prompt_text_ids"]), track_tokens(folder, lm), wanted)
    while answer.waits_for_prefill:
        engine.prefill(answer)
    [steps] = run(engine, [answer])
    assert [step.text_id for step in steps] == case["text_stream"]
    assert [step.audio_id for step in steps] == case["audio_stream"]


@pytest.mark.parametrize("name", RUNS)
def test_golden_run(name):
    run_, folder = RUNS[name], golden("llm") / "checkpoint"
    lm = load_lm(folder, device="cpu", dtype=torch.float32)
    engine = Engine(lm, rows=4)
    wanted = GenerateOptions(run_["output_type"], run_["max_new_tokens"], Sampling.from_arguments(run_["sampling"]))
    answer = engine.begin(golden_prompt(run_), track_tokens(folder, lm), wanted)
    while answer.waits_for_prefill:
        engine.prefill(answer)
    [steps] = run(engine, [answer])
    assert [step.text_id for step in steps] == run_["text_stream"]
    assert [step.audio_id for step in steps] == run_["audio_stream"]


# ---- against itself ---------------------------------------------------------------------------------------------


def drawn_from(engine: Engine, company: int, place: int, monkeypatch) -> dict[tuple[int, str], torch.Tensor]:
    """The logits that one answer's ids are drawn from, per step and track, and its cache in the end.

    It sits at a place among others of other lengths, modes and seeds, in an order that changes with every step.
    """
    others = [
        begun(engine, random_row(3 + 31 * n, seed=n), seed=n, max_steps=40, output_type="text" if n % 2 else "both")
        for n in range(company)
    ]
    mine = begun(engine, seed=1, max_steps=20, forced_text=(4,) * 9, replay=((4, BLANK),))
    seen: dict[tuple[int, str], torch.Tensor] = {}
    real = engine._fused.step

    def noted(feeds, wanted):
        logits = real(feeds, wanted)
        at = next(i for i, feed in enumerate(feeds) if feed.cache is mine.cache)
        for track, row in zip(Track, logits, strict=False):
            if mine.wants(track):
                seen[mine.tracks.index, track.name] = row[at].clone()
        return logits

    monkeypatch.setattr(engine._fused, "step", noted)
    while not mine.over:
        going = [answer for answer in others if not answer.over]
        random.Random(mine.tracks.index).shuffle(going)
        going = going[: engine.rows - 1]
        going.insert(min(place, len(going)), mine)
        engine.step(going)
    monkeypatch.undo()
    assert len(seen) > 8
    return seen


@pytest.mark.parametrize(("company", "place"), [(1, 0), (4, 0), (4, 4), (4, 2), (7, 3)])
@pytest.mark.parametrize("rows", [2, 5, 11, 40])  # 5, 11: filled up to whole blocks; 40: two vectors and a half
def test_neighbours_change_no_bit(rows, company, place, lm, monkeypatch):
    engine = Engine(lm, rows)
    alone, among = (drawn_from(engine, number, place, monkeypatch) for number in (0, company))
    assert alone.keys() == among.keys()
    assert all(torch.equal(alone[key], among[key]) for key in alone)


def test_an_interrupted_answer_goes_on_bit_by_bit(engine):
    cached = begun(engine, seed=2, max_steps=20)
    [whole] = run(engine, [cached])
    for given in (1, 3, 4, len(whole) - 1):
        answer = begun(engine, seed=2, max_steps=20, replay=tuple(ids(whole)[:given]))
        beside = begun(engine, random_row(9, seed=4), seed=4)
        again, _ = run(engine, [answer, beside])
        assert ids(again) == ids(whole)
        assert [step.replayed for step in again] == [True] * given + [False] * (len(whole) - given)
        audio_layers = slice(WIDE.layers, None)  # never skipped, so whole in both
        assert torch.equal(*(each.cache._store[audio_layers, ..., : each.cache.length, :] for each in (answer, cached)))


def test_the_prompt_is_read_in_pieces_that_do_not_depend_on_anything(engine, monkeypatch):
    pieces = []
    real = engine.lm.embed
    monkeypatch.setattr(engine.lm, "embed", lambda tracks: pieces.append(tracks.counts) or real(tracks))
    begun(engine)
    assert pieces == [(engine.piece,), (len(PROMPT.audio_ids) - 1 - engine.piece,)]


# ---- the prompt -------------------------------------------------------------------------------------------------


def test_pieces_of_a_prompt_have_the_features_of_their_positions():
    row = random_row(20, seed=1, segments=((2, 6), (10, 4)), surplus=0)
    pieces = [part(row, begin, min(begin + 3, 20)) for begin in range(0, 20, 3)]
    assert [position for piece in pieces for position in piece.audio_ids] == list(row.audio_ids)
    found = {}
    for number, piece in enumerate(pieces):
        for (begin, codes), frames in zip(piece.segments, piece.features, strict=True):
            found |= {3 * number + begin + j: frames[j] for j in range(codes)}
    whole = zip(row.segments, row.features, strict=True)
    wanted = {begin + j: frames[j] for (begin, codes), frames in whole for j in range(codes)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[position], wanted[position]) for position in wanted)


def test_a_prompt_of_one_position_needs_no_prefill(engine, lm):
    prompt = random_row(1, seed=5)
    assert not engine.begin(prompt, TOKENS, options()).waits_for_prefill
    [steps] = run(engine, [begun(engine, prompt)])
    assert ids(steps) == ids(list(generate(lm, prompt, TOKENS, options())))


def test_features_that_do_not_cover_their_codes_are_refused(engine):
    short = dataclasses.replace(PROMPT, features=[frames[:2] for frames in PROMPT.features])
    with pytest.raises(AudioError, match="has 3 codes but only 2"):
        begun(engine, short)


def test_a_prompt_that_ends_in_audio_is_refused(engine):
    with pytest.raises(ParameterError, match="not with audio"):
        engine.begin(random_row(5, seed=1, segments=((3, 2),)), TOKENS, options())


def test_what_exceeds_the_context_is_refused(engine):
    room = WIDE.max_positions + 1 - len(PROMPT.audio_ids)
    engine.begin(PROMPT, TOKENS, options(max_steps=room))
    with pytest.raises(ParameterError, match="exceed the context of 512"):
        engine.begin(PROMPT, TOKENS, options(max_steps=room + 1))


def test_a_width_with_a_remainder_is_refused():
    """Vector and remainder of a loop round differently, so a turn would depend on its place."""
    with pytest.raises(ConfigError, match="a multiple of 32"):
        Engine(random_lm(), rows=4)


def test_speech_needs_the_audio_branch(lm):
    silent = DualTrackLM(WIDE, text_only=True)
    silent.load_state_dict({name: tensor for name, tensor in lm.state_dict().items() if "mimo" not in name})
    engine = Engine(silent.requires_grad_(False), rows=2)
    with pytest.raises(ParameterError, match="text only"):
        engine.begin(PROMPT, TOKENS, options())
    [steps] = run(engine, [begun(engine, output_type="text")])
    assert ids(steps) == ids(list(generate(lm, PROMPT, TOKENS, options("text"))))


# ---- what goes wrong --------------------------------------------------------------------------------------------


def test_an_answer_that_breaks_takes_nobody_with_it(engine, monkeypatch):
    good, broken, wrong = begun(engine, seed=1), begun(engine, seed=2), begun(engine, seed=3, replay=((5, 50),))
    real = engine._fused.step

    def poisoned(feeds, wanted):
        logits = real(feeds, wanted)
        logits[Track.TEXT, 1] = math.nan
        return logits

    monkeypatch.setattr(engine._fused, "step", poisoned)
    step, numbers, replay = engine.step([good, broken, wrong])
    assert isinstance(step, Step)
    assert isinstance(numbers, NumericsError)
    assert isinstance(replay, ParameterError)


# ---- what is left out -------------------------------------------------------------------------------------------


@pytest.fixture
def computed(engine, monkeypatch):
    """Which parts a step computes, and for how many turns each."""
    parts = []
    fused = engine._fused
    real = fused._through
    names = {id(fused._trunk): "trunk", id(fused._upper): "text", id(fused._mimo): "audio"}

    def noted(layers, rows):
        parts.append((names[id(layers)], len(rows)))
        return real(layers, rows)

    monkeypatch.setattr(fused, "_through", noted)
    return parts


def test_nobody_is_computed_for_a_branch_that_they_do_not_need(engine, computed):
    say, text, both = begun(engine, forced_text=(1, 2)), begun(engine, output_type="text"), begun(engine)
    computed.clear()
    engine.step([say, text, both])
    assert computed == [("trunk", 3), ("text", 2), ("audio", 2)]
    computed.clear()
    engine.step([say])
    assert computed == [("trunk", 1), ("audio", 1)]
    computed.clear()
    engine.step([text])
    assert computed == [("trunk", 1), ("text", 1)]


def test_heads_run_only_when_somebody_draws(engine, monkeypatch):
    asked = []
    real = engine._fused.step
    monkeypatch.setattr(engine._fused, "step", lambda feeds, wanted: asked.append(wanted) or real(feeds, wanted))
    [whole] = run(engine, [begun(engine, seed=6, max_steps=8)])
    asked.clear()
    run(engine, [begun(engine, seed=6, max_steps=8, replay=tuple(ids(whole)[:5]))])
    assert asked[:5] == [Wanted(text=False, audio=False)] * 5
    asked.clear()
    run(engine, [begun(engine, seed=6, max_steps=CONFIG.audio_delay + 1, forced_text=(1, 2))])
    assert [wanted.audio for wanted in asked] == [False] * CONFIG.audio_delay + [True]


def test_text_turns_have_no_room_for_the_audio_branch(engine):
    text, both = begun(engine, output_type="text"), begun(engine)
    assert text.cache.nbytes * (WIDE.layers + WIDE.mimo_layers) == both.cache.nbytes * WIDE.layers
