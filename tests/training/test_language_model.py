"""The language model's trainer: the layout of generation, targets only on what is drawn, and steps that learn."""

from dataclasses import dataclass, replace

import pytest
import torch

from kimia.errors import ConversationError, NumericsError
from kimia.model.generate import GenerateOptions, TrackTokens, collect, generate
from kimia.model.lm import load_lm
from kimia.model.text import TextTokenizer
from training.config import micro_configs, write_configs
from training.language_model import LanguageTraining, Lesson, check_finite, disturbed, lesson, write_language_model
from training.loop import Loop, Plan
from training.tasks import Example, Part

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Clip:
    codes: tuple[int, ...]
    features: torch.Tensor


CALL = Example("talk", (Part("user", "speech", "yes"),), "great what else can i do", spoken=True)
WRITE = Example("transcribe", (Part("user", "text", "write"), Part("user", "speech", "yes")), "yes", spoken=False)
ANSWER = tuple(range(100, 112))


def clip(codes=(1, 2, 3)):
    return Clip(codes, torch.ones(len(codes), 768))


@pytest.fixture(scope="module")
def config():
    return micro_configs().lm


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("micro")
    write_configs(folder)
    return TextTokenizer.load(folder, config)


def test_targets_are_what_generation_draws(config, tokenizer):
    made = lesson(CALL, {0: clip()}, ANSWER, config, tokenizer)
    text = [target for target in made.text_targets if target >= 0]
    audio = [target for target in made.audio_targets if target >= 0]
    assert text == [*tokenizer.encode(CALL.answer), tokenizer.special.text_eos]
    assert audio == [*(config.token_offset + code for code in ANSWER), tokenizer.special.msg_end]
    first_text = made.text_targets.index(text[0])
    assert made.audio_targets.index(audio[0]) == first_text + config.audio_delay
    assert made.row.audio_ids[first_text] == tokenizer.special.assistant_start


def test_what_was_drawn_is_fed_back_one_step_later(config, tokenizer):
    made = lesson(CALL, {0: clip()}, ANSWER, config, tokenizer)
    start = len(made.text_targets) - (config.audio_delay + len(ANSWER) + 1)
    for position in range(start, len(made.text_targets) - 1):
        for ids, targets in ((made.row.text_ids, made.text_targets), (made.row.audio_ids, made.audio_targets)):
            expected = tokenizer.special.blank if targets[position] < 0 else targets[position]
            assert ids[position + 1] == expected


def test_a_written_answer_has_no_audio_to_learn(config, tokenizer):
    made = lesson(WRITE, {1: clip()}, (), config, tokenizer)
    assert set(made.audio_targets) == {-1}
    assert tokenizer.special.ct in made.row.audio_ids
    assert tokenizer.special.ctd in lesson(CALL, {0: clip()}, ANSWER, config, tokenizer).row.audio_ids


def test_history_is_read_not_learned(config, tokenizer):
    call = Example("talk", (CALL.parts[0], Part("assistant", "speech", "great"), CALL.parts[0]), "yes", spoken=True)
    made = lesson(call, {0: clip(), 1: clip((7, 8)), 2: clip()}, ANSWER, config, tokenizer)
    assert config.token_offset + 7 in made.row.audio_ids
    assert config.token_offset + 7 not in made.audio_targets
    assert len(made.row.segments) == len(made.row.features) == 2


@pytest.mark.parametrize(("example", "answer"), [(CALL, ()), (WRITE, ANSWER)])
def test_an_answer_of_the_wrong_kind_is_refused(config, tokenizer, example, answer):
    with pytest.raises(ConversationError, match="codes to say"):
        lesson(example, {0: clip(), 1: clip()}, answer, config, tokenizer)


def test_a_text_that_outlasts_its_speech_is_refused(config, tokenizer):
    long = Example("say", (), "yes " * 20, spoken=True)
    with pytest.raises(ConversationError, match="outlast"):
        lesson(long, {}, (1, 2), config, tokenizer)


def test_ids_and_targets_of_different_length_are_refused(config, tokenizer):
    made = lesson(CALL, {0: clip()}, ANSWER, config, tokenizer)
    with pytest.raises(ConversationError, match="differ in length"):
        Lesson(made.row, made.text_targets[1:], made.audio_targets)


def test_disturbing_changes_codes_alone(config, tokenizer):
    made = lesson(CALL, {0: clip()}, ANSWER * 20, config, tokenizer)
    other = disturbed(made, config, torch.Generator().manual_seed(0), share=0.5)
    changed = [before for before, after in zip(made.row.audio_ids, other.row.audio_ids, strict=True) if before != after]
    assert 80 < len(changed) < 160
    assert min(changed) >= config.token_offset
    assert min(other.row.audio_ids) == min(made.row.audio_ids)
    assert other.audio_targets == made.audio_targets


def test_what_was_learned_by_heart_is_generated(config, tokenizer, tmp_path):
    """The one proof that training and generation speak of the same layout."""
    torch.manual_seed(0)
    small = replace(config, hidden_size=96, intermediate_size=128, layers=2, mimo_layers=1, fork_layer=0)
    training = LanguageTraining(small)
    lessons = [
        lesson(CALL, {0: clip()}, ANSWER, config, tokenizer),
        lesson(Example("say", (), "goodbye", spoken=True), {}, ANSWER[:5], config, tokenizer),
    ]
    plan = Plan(steps=40, learning_rate=1e-2, warmup=3, weight_decay=0.0, report_every=5)
    Loop("lm", training, lambda step: training.losses(lessons), plan, tmp_path).run()
    prompt = lessons[0].row
    start = prompt.audio_ids.index(tokenizer.special.assistant_start) + 1
    question = type(prompt)(prompt.audio_ids[:start], prompt.text_ids[:start], prompt.segments, prompt.features)
    result = answered(training.lm, question, tokenizer)
    assert tokenizer.decode(result.text_ids) == CALL.answer
    assert result.audio_codes == ANSWER
    assert result.stop == "audio_eod"


def answered(lm, row, tokenizer):
    special, config = tokenizer.special, lm.config
    ends = frozenset({special.msg_end, special.media_end})
    tokens = TrackTokens(
        special.blank, special.text_eos, ends, config.token_offset, config.vocab_size, config.audio_delay
    )
    return collect(generate(lm, row, tokens, GenerateOptions("both", 40)), tokens, "both")


def test_weights_that_are_not_finite_are_not_shipped(config):
    lm = LanguageTraining(config).lm
    check_finite(lm)
    with torch.no_grad():
        lm.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="lm_head"):
        check_finite(lm)


def test_what_is_written_loads_strictly(config, tmp_path):
    write_configs(tmp_path)
    training = LanguageTraining(config)
    write_language_model(tmp_path, training)
    loaded = load_lm(tmp_path, device="cpu", dtype=torch.bfloat16)
    for name, value in training.lm.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.bfloat16(), rtol=0, atol=0)
