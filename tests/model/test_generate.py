"""The generation loop against golden runs, and its rules on a small random model."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from kimia.errors import ParameterError
from kimia.model.audio import load_audio
from kimia.model.config import EncoderConfig, exact_div
from kimia.model.generate import GenerateOptions, TrackTokens, TurnTracks, collect, generate
from kimia.model.lm import DualTrackLM, Row, load_lm, stack
from kimia.model.philox import Track, uniform
from kimia.model.sampler import Sampling
from kimia.model.text import TextTokenizer
from kimia.model.whisper import load_whisper
from tests.golden_data import golden, golden_json
from tests.model.tiny_lm import (
    BLANK,
    CONFIG,
    MEDIA_END,
    MSG_END,
    TEXT_EOS,
    TOKENS,
    PlainLM,
    golden_or,
    random_lm,
    random_row,
    runs,
)

pytestmark = pytest.mark.parity

RUNS = {run["name"]: run for run in golden_or("llm", "goldens/decode.json", {"runs": []})["runs"]}
CASES = {case["name"]: case for case in golden_or("e2e", "cases.json", {"cases": []})["cases"]}


def track_tokens(folder, lm: DualTrackLM) -> TrackTokens:
    special = TextTokenizer.load(folder, lm.config).special
    return TrackTokens(
        blank=special.blank,
        text_eos=special.text_eos,
        audio_ends=frozenset({special.msg_end, special.media_end}),
        token_offset=lm.config.token_offset,
        vocabulary=lm.config.vocab_size,
        delay=lm.config.audio_delay,
    )


# ---- golden runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_model() -> tuple[DualTrackLM, TrackTokens]:
    folder = golden("llm") / "checkpoint"
    lm = load_lm(folder, device="cpu", dtype=torch.float32)
    return lm, track_tokens(folder, lm)


def golden_prompt(run) -> Row:
    features = load_file(golden("llm") / "goldens/audio_features.safetensors")
    return Row(
        run["prompt_audio_ids"],
        run["prompt_text_ids"],
        runs(run["is_continuous_mask"]),
        [features[f"features.{clip}"] for clip in run["continuous_feature_order"]],
    )


@pytest.mark.parametrize("name", RUNS)
def test_golden_logits_of_every_step(name, golden_model):
    logits = load_file(golden("llm") / "goldens/decode_logits.safetensors")
    if f"{name}.text_logits" not in logits:
        pytest.skip("the reference stored no logits of this run")
    run, (lm, _) = RUNS[name], golden_model
    past, feed = lm.new_cache(rows=1), golden_prompt(run)
    for index, (text_id, audio_id) in enumerate(zip(run["text_stream"], run["audio_stream"], strict=True)):
        step = lm(stack([feed], lm.device), past)
        for track in ("text", "audio"):
            wanted = logits[f"{name}.{track}_logits"][index]
            torch.testing.assert_close(getattr(step, f"{track}_logits")[0, -1], wanted, atol=5e-5, rtol=0)
        feed = Row((audio_id,), (text_id,))


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("name", RUNS)
def test_golden_run(name, plain, golden_model):
    run, (lm, tokens) = RUNS[name], golden_model
    prompt = golden_prompt(run)
    sampling = Sampling.from_arguments(run["sampling"])
    options = GenerateOptions(run["output_type"], run["max_new_tokens"], sampling, plain=plain)
    steps = list(generate(lm, prompt, tokens, options))
    result = collect(steps, tokens, run["output_type"])
    assert result.text_stream == tuple(run["text_stream"])
    assert result.audio_stream == tuple(run["audio_stream"])
    assert result.returned_text == tuple(run["returned_text"])
    assert result.returned_audio == tuple(run["returned_audio"])
    assert result.text_ids == tuple(run["filtered_text_ids"])
    assert result.audio_codes == tuple(run["filtered_audio_codes"])
    assert (result.stop, len(steps)) == (run["stop"], run["steps"])
    if plain:
        assert [step.raw_text for step in steps] == run["raw_text"]
        assert [step.raw_audio for step in steps] == run["raw_audio"]


@pytest.fixture(scope="module")
def conversation_model():
    folder = golden("e2e") / golden_json("e2e", "cases.json")["model"]
    lm = load_lm(folder, device="cpu", dtype=torch.float32)
    whisper_folder = folder / "whisper-large-v3"
    width = EncoderConfig.read(whisper_folder / "config.json").d_model
    group = exact_div(lm.config.adaptor_input_dim, width, "features")
    whisper = load_whisper(whisper_folder, group, "cpu", torch.float32)

    @cache
    def features(path: str) -> torch.Tensor:
        return whisper.encode([load_audio(golden("e2e") / path, whisper.features.sample_rate)])[0]

    return lm, track_tokens(folder, lm), features


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_golden_conversation(name, plain, conversation_model):
    """Ids of the end-to-end cases, the sampled ones from their recorded uniform numbers."""
    case, (lm, tokens, features) = CASES[name], conversation_model
    clips = [message["content"] for message in case["messages"] if message["message_type"] == "audio"]
    prompt = Row(
        case["prompt_audio_ids"],
        case["prompt_text_ids"],
        runs(case["is_continuous_mask"]),
        [features(clip) for clip in clips],
    )
    numbers = case["uniforms"]
    options = GenerateOptions(
        case["output_type"],
        case["max_new_tokens"],
        Sampling.from_arguments(case["sampling"]),
        uniforms=None if numbers is None else lambda track, step: numbers[2 * step + (track is Track.AUDIO)],
        plain=plain,
    )
    result = collect(generate(lm, prompt, tokens, options), tokens, case["output_type"])
    assert result.text_stream == tuple(case["text_stream"])
    assert result.audio_stream == tuple(case["audio_stream"])
    assert result.text_ids == tuple(case["text_ids"])
    assert result.audio_codes == tuple(case["audio_codes"])
    assert result.stop == case["stop"]


# ---- a small random model ---------------------------------------------------------------------------------------

SCRIPT = Sampling()  # the tracks' defaults differ by their windows
PROMPT = random_row(8, seed=11, segments=((2, 3),))
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


@pytest.fixture(scope="module")
def lm() -> DualTrackLM:
    return random_lm(seed=3)


def answer(lm, output_type="both", max_steps=25, prompt=PROMPT, tokens=TOKENS, **options):
    return list(generate(lm, prompt, tokens, GenerateOptions(output_type, max_steps, **options)))


def fed_back(steps) -> list[tuple[int, int]]:
    return [(step.text_id, step.audio_id) for step in steps]


@pytest.fixture
def calls(lm, monkeypatch):
    """How often each part of the model ran."""
    counts = dict.fromkeys(("trunk", "text_branch", "audio_branch", "lm_head", "mimo_output"), 0)

    def counted(name, original):
        def call(*args):
            counts[name] += 1
            return original(*args)

        return call

    for name in ("trunk", "text_branch", "audio_branch"):
        monkeypatch.setattr(lm, name, counted(name, getattr(lm, name)))
    for name in ("lm_head", "mimo_output"):
        head = getattr(lm, name)
        monkeypatch.setattr(head, "forward", counted(name, head.forward))
    return counts


def scripted(monkeypatch, text: list[int], audio: list[int]):
    """A model whose draws are given: only the rules of the loop remain."""
    text_ids, audio_ids = itertools.count(), itertools.count()

    def choose(logits, params, histories, uniforms):
        return [text[next(text_ids)] if params[0] == SCRIPT.text else audio[next(audio_ids)]]

    monkeypatch.setattr("kimia.model.generate.choose", choose)


def test_greedy_steps_equal_the_plain_network_without_cache(lm):
    """The whole prefix through the written-out network at every step."""
    network, audio, text = PlainLM(lm), list(PROMPT.audio_ids), list(PROMPT.text_ids)
    steps = answer(lm, max_steps=6, plain=True)
    for step in steps:
        wanted = network(dataclasses.replace(PROMPT, audio_ids=audio, text_ids=text))
        assert step.raw_text == int(wanted["text_logits"][-1].argmax())
        assert step.raw_audio == int(wanted["audio_logits"][-1].argmax())
        audio.append(step.audio_id)
        text.append(step.text_id)
    assert len(steps) == 6


@pytest.mark.parametrize("output_type", ["text", "both"])
@pytest.mark.parametrize("seed", range(6))
def test_savings_do_not_change_the_answer(seed, output_type, lm):
    fast = answer(lm, output_type, sampling=SAMPLED, seed=seed)
    plain = answer(lm, output_type, sampling=SAMPLED, seed=seed, plain=True)
    assert fed_back(fast) == fed_back(plain)
    assert fast[-1].stop == plain[-1].stop
    assert all(step.raw_text is not None and step.raw_audio is not None for step in plain)
    for one, other in zip(fast, plain, strict=True):
        assert one.raw_text in (None, other.raw_text)
        assert one.raw_audio in (None, other.raw_audio)


def test_a_seed_gives_one_answer_and_another_seed_another(lm):
    first, again, other = (answer(lm, sampling=SAMPLED, seed=seed) for seed in (5, 5, 6))
    assert fed_back(first) == fed_back(again) != fed_back(other)


def test_numbers_are_drawn_by_track_and_step(lm):
    drawn = []

    def numbers(track, step):
        drawn.append((track, step))
        return uniform(5, track, step)

    steps = answer(lm, max_steps=5, sampling=SAMPLED, uniforms=numbers, plain=True)
    assert drawn == [(track, step) for step in range(len(steps)) for track in (Track.TEXT, Track.AUDIO)]
    assert fed_back(steps) == fed_back(answer(lm, max_steps=5, sampling=SAMPLED, seed=5))


# ---- what is skipped --------------------------------------------------------------------------------------------


def test_text_mode_never_runs_the_audio_branch(lm, calls, monkeypatch):
    scripted(monkeypatch, text=[1, 2, 3, 4, TEXT_EOS], audio=[])
    answer(lm, "text")
    assert calls == {"trunk": 5, "text_branch": 5, "audio_branch": 0, "lm_head": 5, "mimo_output": 0}


def test_text_mode_works_without_the_audio_branch_in_memory(lm):
    text_only = DualTrackLM(CONFIG, text_only=True)
    text_only.load_state_dict({name: tensor for name, tensor in lm.state_dict().items() if "mimo" not in name})
    text_only.requires_grad_(False)
    assert fed_back(answer(text_only, "text", plain=True)) == fed_back(answer(lm, "text"))
    with pytest.raises(ParameterError, match="text only"):
        answer(text_only, "both")


def test_after_the_text_and_during_the_delay_parts_are_left_out(lm, calls, monkeypatch):
    scripted(monkeypatch, text=[1, TEXT_EOS], audio=[50, 51, 52, MSG_END])
    steps = answer(lm)
    assert len(steps) == CONFIG.audio_delay + 4
    assert calls == {"trunk": 7, "text_branch": 2, "audio_branch": 7, "lm_head": 2, "mimo_output": 4}


def test_a_given_text_needs_no_text_branch(lm, calls):
    steps = answer(lm, forced_text=(7, 8))
    assert calls["text_branch"] == calls["lm_head"] == 0
    assert calls["audio_branch"] == len(steps)


def test_text_mode_allocates_no_cache_for_the_audio_branch(lm, monkeypatch):
    made = []
    new_cache = lm.new_cache
    monkeypatch.setattr(lm, "new_cache", lambda rows: made.append(new_cache(rows)) or made[-1])
    answer(lm, "text", max_steps=3)
    assert made[0].keys[CONFIG.layers :] == [None] * CONFIG.mimo_layers


# ---- rules of the tracks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_audio_starts_after_the_delay(delay, lm, monkeypatch):
    tokens = dataclasses.replace(TOKENS, delay=delay)
    scripted(monkeypatch, text=[1, 2, 3, 4, 5, 6], audio=[50, 51, MEDIA_END])
    steps = answer(lm, tokens=tokens)
    assert [step.audio_id for step in steps] == [BLANK] * delay + [50, 51, MEDIA_END]
    result = collect(steps, tokens, "both")
    assert result.returned_audio == (50, 51, MEDIA_END)
    assert result.audio_codes == (10, 11)


@pytest.mark.parametrize("end", [MSG_END, MEDIA_END])
def test_speech_stops_at_either_audio_end_and_not_at_the_end_of_the_text(end, lm, monkeypatch):
    scripted(monkeypatch, text=[1, TEXT_EOS], audio=[50, end])
    steps = answer(lm)
    assert [step.text_id for step in steps] == [1, TEXT_EOS, BLANK, BLANK, BLANK]
    assert [step.stop for step in steps] == [None] * 4 + ["audio_eod"]


def test_an_audio_end_drawn_during_the_delay_does_not_stop(lm, monkeypatch):
    scripted(monkeypatch, text=[1] * 9, audio=[MSG_END] * CONFIG.audio_delay + [50, MSG_END])
    steps = answer(lm, plain=True)
    assert [step.raw_audio for step in steps] == [MSG_END] * 3 + [50, MSG_END]
    assert [step.audio_id for step in steps] == [BLANK] * 3 + [50, MSG_END]


def test_text_stops_at_its_end_and_the_end_is_fed_back(lm, monkeypatch):
    scripted(monkeypatch, text=[1, BLANK, TEXT_EOS], audio=[])
    steps = answer(lm, "text")
    assert fed_back(steps) == [(1, BLANK), (BLANK, BLANK), (TEXT_EOS, BLANK)]
    assert steps[-1].stop == "text_eos"
    assert collect(steps, TOKENS, "text").returned_text == (1, BLANK)


def test_the_budget_stops(lm, monkeypatch):
    scripted(monkeypatch, text=[1] * 5, audio=[50] * 5)
    steps = answer(lm, max_steps=5)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert steps[-1].stop == "max_new_tokens"


@pytest.mark.parametrize("max_steps", [0, -3])
def test_no_budget_no_step(max_steps, lm):
    assert answer(lm, max_steps=max_steps) == []
    assert collect([], TOKENS, "both").stop is None


def test_a_reason_of_the_model_goes_before_the_budget(lm, monkeypatch):
    scripted(monkeypatch, text=[TEXT_EOS], audio=[])
    assert answer(lm, "text", max_steps=1)[-1].stop == "text_eos"


def test_the_penalty_sees_the_forced_ids(lm, monkeypatch):
    """Blanks of the delay and after the text are history, what was drawn under them is not."""
    seen = []

    def choose(logits, params, histories, uniforms):
        seen.append(list(histories[0]))
        return [TEXT_EOS if params[0] == SCRIPT.text else 50]

    monkeypatch.setattr("kimia.model.generate.choose", choose)
    answer(lm, max_steps=5, plain=True)
    text = [TEXT_EOS, BLANK, BLANK, BLANK]
    audio = [BLANK, BLANK, BLANK, 50]
    assert seen == [track[:step] for step in range(5) for track in (text, audio)]


def test_illegal_ids_are_dropped_and_counted(lm, monkeypatch):
    scripted(monkeypatch, text=[1, 50, 2, TEXT_EOS], audio=[50, 3, BLANK, 60, MSG_END])
    result = collect(answer(lm), TOKENS, "both")
    assert (result.text_ids, result.illegal_text) == ((1, 2), 1)
    assert (result.audio_codes, result.illegal_audio) == ((10, 20), 2)
    assert result.returned_audio == (50, 3, BLANK, 60, MSG_END)


# ---- a given text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_a_given_text_is_said(plain, lm):
    steps = answer(lm, forced_text=(7, 8), sampling=SAMPLED, seed=1, plain=plain)
    text = [step.text_id for step in steps]
    assert text == [7, 8, TEXT_EOS, *[BLANK] * (len(steps) - 3)]
    assert fed_back(steps) == fed_back(answer(lm, forced_text=(7, 8), sampling=SAMPLED, seed=1))
    assert collect(steps, TOKENS, "both").text_ids == (7, 8)


def test_an_empty_text_ends_at_once(lm):
    assert answer(lm, forced_text=(), max_steps=2)[0].text_id == TEXT_EOS


@pytest.mark.parametrize("token", [TEXT_EOS, -1, CONFIG.token_offset])
def test_a_given_text_holds_text_ids_only(token, lm):
    with pytest.raises(ParameterError, match="position 1 of the text to say"):
        answer(lm, forced_text=(7, token))


def test_a_given_text_needs_speech():
    with pytest.raises(ParameterError, match="must be 'both'"):
        GenerateOptions("text", 5, forced_text=(1,))


# ---- taking a turn over -----------------------------------------------------------------------------------------


def replayed(lm, whole, done, **options):
    return answer(lm, replay=tuple(fed_back(whole)[:done]), **options)


@pytest.mark.parametrize("forced_text", [None, (7, 8, 9)])
@pytest.mark.parametrize("done", [0, 1, 2, 4, 7, 11])
def test_a_replayed_turn_goes_on_as_if_undisturbed(done, forced_text, lm):
    endless = dataclasses.replace(TOKENS, audio_ends=frozenset())
    options = {"sampling": SAMPLED, "seed": 2, "forced_text": forced_text, "max_steps": 12, "tokens": endless}
    whole = answer(lm, **options)
    again = replayed(lm, whole, done, **options)
    assert fed_back(again) == fed_back(whole)
    assert [step.replayed for step in again] == [index < done for index in range(len(whole))]
    assert [step.stop for step in again] == [step.stop for step in whole]
    assert fed_back(replayed(lm, whole, done, **options, plain=True)) == fed_back(whole)


def test_replay_goes_on_after_the_end_of_the_text(lm, monkeypatch):
    audio = [50, 51, 52, 53, 54, MSG_END]
    scripted(monkeypatch, text=[1, TEXT_EOS], audio=audio)
    whole = answer(lm)
    scripted(monkeypatch, text=[], audio=audio[2:])
    assert fed_back(replayed(lm, whole, CONFIG.audio_delay + 2)) == fed_back(whole)


def test_replay_gives_the_cache_of_the_undisturbed_run(lm, monkeypatch):
    made = []
    new_cache = lm.new_cache
    monkeypatch.setattr(lm, "new_cache", lambda rows: made.append(new_cache(rows)) or made[-1])
    whole = answer(lm, max_steps=6, sampling=SAMPLED, seed=2)
    replayed(lm, whole, 5, max_steps=6, sampling=SAMPLED, seed=2)
    undisturbed, again = made
    assert undisturbed.filled == again.filled
    for one, other in zip(undisturbed.keys + undisturbed.values, again.keys + again.values, strict=True):
        assert torch.equal(one, other)


def test_replaying_computes_no_head(lm, calls, monkeypatch):
    scripted(monkeypatch, text=[1] * 6, audio=[50] * 6)
    whole = answer(lm, max_steps=6)
    calls.update(dict.fromkeys(calls, 0))
    assert fed_back(replayed(lm, whole, 6, max_steps=6)) == fed_back(whole)
    assert calls == {"trunk": 6, "text_branch": 6, "audio_branch": 6, "lm_head": 0, "mimo_output": 0}


@pytest.mark.parametrize(
    ("output_type", "replay", "message"),
    [
        ("both", ((TEXT_EOS, BLANK), (1, BLANK)), "step 1 has text id 1"),
        ("both", ((1, 50),), "step 0 has audio id 50"),
        ("text", ((1, BLANK), (1, BLANK), (1, BLANK), (1, 50)), "step 3 has audio id 50"),
        ("text", ((TEXT_EOS, BLANK), (BLANK, BLANK)), "go on after the turn has stopped at step 0"),
        ("both", ((CONFIG.vocab_size, BLANK),), "step 0 has an id outside"),
        ("both", ((1, BLANK),) * 26, "26 steps to replay exceed the budget of 25"),
    ],
)
def test_an_impossible_log_is_refused(output_type, replay, message, lm):
    with pytest.raises(ParameterError, match=message):
        answer(lm, output_type, replay=replay)


def test_a_log_that_says_another_text_is_refused(lm):
    with pytest.raises(ParameterError, match="step 1 has text id 9, not the 8 due"):
        answer(lm, forced_text=(7, 8), replay=((7, BLANK), (9, BLANK)))


# ---- state ------------------------------------------------------------------------------------------------------


def test_a_track_never_goes_on_from_an_id_that_was_skipped():
    tracks = TurnTracks(TOKENS, GenerateOptions("text", 5))
    with pytest.raises(RuntimeError, match="skipped"):
        tracks.record(None, None)


@pytest.mark.parametrize("options", [{"output_type": "audio"}, {"seed": -1}])
def test_options_outside_their_domain_are_refused(options):
    with pytest.raises(ParameterError):
        GenerateOptions(**{"output_type": "both", "max_steps": 5} | options)
