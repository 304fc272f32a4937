"""One turn in one process: upstream's call, streaming, speaking a given text, memory by ids, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kimia.pipeline
from kimia.errors import AudioError, CheckpointError, ContextLengthError, ConversationError, ParameterError
from kimia.model.generate import Step
from kimia.model.prompt import SPEECH_STEPS
from kimia.pipeline import AudioChunk, KimiAudio, TextDelta, TurnDone
from tests.golden_data import COMMITTED, golden, golden_json

pytestmark = pytest.mark.parity

SPOKEN = {"audio_temperature": 0.8, "audio_top_k": 10, "text_temperature": 0.7, "seed": 11}
QUESTION = str(COMMITTED / "e2e" / "audio" / "clip_b2.wav")  # 1.5 s
ASK = [{"role": "user", "message_type": "audio", "content": QUESTION}]


@pytest.fixture(scope="session")
def model() -> KimiAudio:
    return KimiAudio(golden("e2e") / "model", device="cpu", dtype=torch.float32)


def located(messages: list, folder: Path) -> list:
    """Golden messages with their audio paths below the set's folder."""
    found = json.loads(json.dumps(messages))
    for message in found:
        if message["message_type"] == "audio":
            message["content"] = str(folder / message["content"])
        elif message["message_type"] == "audio-text":
            message["content"][0] = str(folder / message["content"][0])
    return found


def played(events) -> tuple[str, np.ndarray, TurnDone]:
    events = list(events)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    pcm = [event.pcm for event in events if isinstance(event, AudioChunk)]
    return text, np.concatenate(pcm or [np.zeros(0, np.float32)]), events[-1]


# ---- generate: upstream's call and result -----------------------------------------------------------------------

GREEDY = [case for case in golden_json("e2e", "cases.json")["cases"] if not case["uniforms"]]


@pytest.mark.parametrize("case", GREEDY, ids=lambda case: case["name"])
def test_text_and_length_of_the_reference(model: KimiAudio, case: dict) -> None:
    wav, text = model.generate(
        located(case["messages"], golden("e2e")),
        output_type=case["output_type"],
        max_new_tokens=case["max_new_tokens"],
        seed=0,
        **case["sampling"],
    )
    assert text == case["text"]
    assert (None if wav is None else wav.shape) == ((1, case["wav_samples"]) if case["output_type"] == "both" else None)


def test_the_seed_repeats_a_turn_and_another_one_does_not(model: KimiAudio) -> None:
    first, again, other = (
        model.generate(ASK, "both", max_new_tokens=30, **{**SPOKEN, "seed": seed}) for seed in (1, 1, 2)
    )
    assert first[1] == again[1]
    assert torch.equal(first[0], again[0])
    assert first[1] != other[1] or not torch.equal(first[0], other[0])


def test_the_seed_decides_the_noise_of_the_speech(model: KimiAudio) -> None:
    """Greedy ids are the same whatever the seed; the sound is not."""
    one, two = (model.generate(ASK, "both", max_new_tokens=24, seed=seed) for seed in (1, 2))
    assert one[1] == two[1]
    assert one[0].shape == two[0].shape
    assert not torch.equal(one[0], two[0])


def test_without_a_seed_turns_differ(model: KimiAudio) -> None:
    options = {**SPOKEN, "seed": None}
    assert len({model.generate(ASK, "both", max_new_tokens=20, **options)[1] for _ in range(3)}) > 1


def test_arrays_bytes_and_files_give_the_same(model: KimiAudio) -> None:
    import soundfile

    samples, rate = soundfile.read(QUESTION, dtype="float32")
    answers = {
        model.generate([{"role": "user", "message_type": "audio", "content": content}], max_new_tokens=12)[1]
        for content in (QUESTION, Path(QUESTION), Path(QUESTION).read_bytes(), (samples, rate))
    }
    assert len(answers) == 1


def test_no_legal_code_gives_text_and_empty_audio(model: KimiAudio) -> None:
    wav, _ = model.generate(ASK, "both", max_new_tokens=model.config.audio_delay, seed=0)
    assert wav.shape == (1, 0)


# ---- stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["upstream", "low-latency"])
def test_streaming_equals_the_whole(model: KimiAudio, preset: str) -> None:
    options = {**SPOKEN, "preset": preset, "max_new_tokens": 70}
    wav, text = model.generate(ASK, "both", **options)
    streamed, pcm, done = played(model.stream(ASK, "both", **options))
    assert streamed == text == done.text
    assert np.array_equal(pcm, wav[0].numpy())
    assert len(pcm) == len(done.result.audio_codes) * model.detokenizer.samples_per_token


def test_audio_leaves_while_the_model_still_generates(model: KimiAudio, monkeypatch) -> None:
    """Low latency: the first chunk needs 6 + 4 codes after the delay, and leaves before the next step is taken."""
    taken = []
    real = kimia.pipeline.generate

    def counting(*args):
        for step in real(*args):
            taken.append(step.index)
            yield step

    monkeypatch.setattr(kimia.pipeline, "generate", counting)
    events = model.stream(ASK, "both", max_new_tokens=60, **SPOKEN)
    next(event for event in events if isinstance(event, AudioChunk))
    legal = sum(taken_step >= model.config.audio_delay for taken_step in taken)
    assert 10 <= legal < 40
    assert isinstance(played(events)[2], TurnDone)


def test_chunks_are_numbered_and_never_empty(model: KimiAudio) -> None:
    chunks = [e for e in model.stream(ASK, "both", max_new_tokens=60, **SPOKEN) if isinstance(e, AudioChunk)]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(len(chunk.pcm) for chunk in chunks)
    assert len(chunks) > 1


def test_two_turns_may_be_interleaved(model: KimiAudio) -> None:
    options = {**SPOKEN, "max_new_tokens": 40}
    alone = played(model.stream(ASK, "both", **options))
    one, two = (model.stream(ASK, "both", **options) for _ in range(2))
    pairs = list(zip(one, two, strict=True))
    for events in ([pair[0] for pair in pairs], [pair[1] for pair in pairs]):
        text, pcm, _ = played(events)
        assert text == alone[0]
        assert np.array_equal(pcm, alone[1])


def test_a_stream_is_checked_before_it_is_read(model: KimiAudio) -> None:
    with pytest.raises(ConversationError):
        model.stream([])


def scripted(model: KimiAudio, monkeypatch, ids: list[int], preset: str) -> list[TextDelta]:
    """The text events of a turn whose text track is given."""
    blank = model.track_tokens.blank
    steps = [Step(i, token, blank, None, None, replayed=False, stop=None) for i, token in enumerate(ids)]
    monkeypatch.setattr(kimia.pipeline, "generate", lambda *args: iter(steps))
    return [event for event in model.stream(ASK, "text", preset=preset) if isinstance(event, TextDelta)]


def test_text_ends_with_what_an_unfinished_character_leaves(model: KimiAudio, monkeypatch) -> None:
    ids = model.tokenizer.encode("a")
    half = next(i for i in range(256) if model.tokenizer.token_bytes(i) == b"\xe4")
    assert [e.text for e in scripted(model, monkeypatch, [*ids, half], "low-latency")] == ["a", "\ufffd"]


def test_audio_codes_in_the_text_track_are_left_out(model: KimiAudio, monkeypatch) -> None:
    ids = [model.config.token_offset + 3, *model.tokenizer.encode("a"), model.config.vocab_size - 1]
    assert [(e.text, e.step) for e in scripted(model, monkeypatch, ids, "low-latency")] == [("a", 1)]


def test_special_tokens_are_shown_by_upstreams_preset_only(model: KimiAudio, monkeypatch) -> None:
    special = model.tokenizer.special
    ids = [special.blank, *model.tokenizer.encode("a"), special.text_eos, *model.tokenizer.encode("b")]
    texts = {p: "".join(e.text for e in scripted(model, monkeypatch, ids, p)) for p in ("upstream", "low-latency")}
    assert texts == {"upstream": "<|im_kimia_text_blank|>a", "low-latency": "a"}


# ---- say --------------------------------------------------------------------------------------------------------


def test_say_forces_the_text_and_samples_the_audio(model: KimiAudio, monkeypatch) -> None:
    done = []
    real = kimia.pipeline.collect
    monkeypatch.setattr(kimia.pipeline, "collect", lambda *args: done.append(real(*args)) or done[-1])
    wav = model.say("Your order is on its way.", max_new_tokens=40, **SPOKEN)
    assert model.tokenizer.decode(done[0].returned_text) == "Your order is on its way."
    assert wav.shape == (1, len(done[0].audio_codes) * model.detokenizer.samples_per_token)


def test_what_was_said_before_changes_how_a_text_is_spoken(model: KimiAudio) -> None:
    options = {**SPOKEN, "max_new_tokens": 24}
    alone, after = model.say("Hello", **options), model.say("Hello", ASK, **options)
    assert alone.shape != after.shape or not torch.equal(alone, after)


def test_say_needs_a_step_more_than_the_text_has_tokens(model: KimiAudio) -> None:
    tokens = len(model.tokenizer.encode("Hello"))
    assert model.say("Hello", max_new_tokens=tokens + 1, seed=0).shape[0] == 1
    with pytest.raises(ParameterError, match="shorten"):
        model.say("Hello", max_new_tokens=tokens, seed=0)


@pytest.mark.parametrize(("text", "limit"), [("", 100), ("a long text that does not fit", 3)])
def test_say_refuses_nothing_and_too_much(model: KimiAudio, text: str, limit: int) -> None:
    with pytest.raises(ParameterError):
        model.say(text, max_new_tokens=limit)


# ---- memory over turns ------------------------------------------------------------------------------------------


def test_an_answer_goes_back_by_its_ids(model: KimiAudio) -> None:
    done = played(model.stream(ASK, "both", max_new_tokens=40, **SPOKEN))[2]
    message = done.message()
    codes = [token - model.config.token_offset for token in message["audio_tokens"]]
    assert codes == list(done.result.audio_codes)
    assert message["text_tokens"] == list(done.result.text_ids[: model.config.audio_delay + len(codes)])
    follow = [*ASK, message, {"role": "user", "message_type": "text", "content": "And then?"}]
    assert played(model.stream(follow, "both", max_new_tokens=12, **SPOKEN))[2].steps > 0


def test_history_by_ids_equals_history_encoded_from_sound(model: KimiAudio) -> None:
    """Spoken history is its codes and its transcript: given as ids, the next answer is the same."""
    codes = model.encoder.vq.encode([kimia.pipeline.load_clip(QUESTION, model.encoder.sample_rate)])[0].tolist()
    spoken = {"role": "assistant", "message_type": "audio-text", "content": [QUESTION, "Sure."]}
    by_ids = {
        "role": "assistant",
        "message_type": "audio-text",
        "audio_tokens": [model.config.token_offset + code for code in codes],
        "text_tokens": model.tokenizer.encode("Sure."),
    }
    answers = [
        model.generate([*ASK, history, *ASK], "both", max_new_tokens=40, seed=3)[1] for history in (spoken, by_ids)
    ]
    assert answers[0] == answers[1]


def test_history_is_cut_to_what_was_heard(model: KimiAudio) -> None:
    done = played(model.stream(ASK, "both", max_new_tokens=40, **SPOKEN))[2]
    message = done.message(heard=3)
    assert len(message["audio_tokens"]) == 3
    assert len(message["text_tokens"]) <= model.config.audio_delay + 3
    assert played(model.stream([*ASK, message, *ASK], "both", max_new_tokens=8, **SPOKEN))[2].steps > 0
    with pytest.raises(ParameterError, match="heard"):
        done.message(heard=-1)


def test_an_answer_of_text_goes_back_as_text(model: KimiAudio) -> None:
    done = played(model.stream(ASK, "text", max_new_tokens=9))[2]
    message = done.message()
    assert message["message_type"] == "text"
    assert message["text_tokens"] == list(done.result.text_ids)
    assert model.generate([*ASK, message, *ASK], max_new_tokens=5)


# ---- budgets ----------------------------------------------------------------------------------------------------


def test_speech_is_bounded_by_two_minutes_unless_the_preset_is_upstreams(model: KimiAudio) -> None:
    turns = {name: model._prepare(ASK, "both", {"preset": name}) for name in ("upstream", "low-latency")}
    positions = len(turns["upstream"].prompt)
    assert turns["upstream"].options.max_steps == SPEECH_STEPS - positions
    assert turns["low-latency"].options.max_steps == SPEECH_STEPS + model.config.audio_delay


@pytest.mark.parametrize("preset", ["upstream", "low-latency"])
def test_the_callers_limit_holds(model: KimiAudio, preset: str) -> None:
    assert played(model.stream(ASK, "both", max_new_tokens=7, preset=preset))[2].steps == 7


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_encoded(model: KimiAudio, monkeypatch) -> None:
    monkeypatch.setattr(model.encoder, "encode", lambda waves: pytest.fail("encoded"))
    long = (np.zeros(model.encoder.samples_per_position * model.config.max_positions, np.float32), 16000)
    for preset in ("low-latency", "upstream"):
        with pytest.raises(ContextLengthError, match=r"message 1: .*8192"):
            model.generate([*ASK, {"role": "user", "message_type": "audio", "content": long}], preset=preset)


def test_upstreams_preset_says_when_its_two_minutes_are_used_up(model: KimiAudio) -> None:
    long = (np.zeros(model.encoder.samples_per_position * SPEECH_STEPS, np.float32), 16000)
    chat = [*ASK, {"role": "user", "message_type": "audio", "content": long}]
    with pytest.raises(ContextLengthError, match=r"message 1: .*1500; use the preset low-latency"):
        model.generate(chat, "both")
    assert model.stream(chat, "both", max_new_tokens=1)


# ---- what is refused --------------------------------------------------------------------------------------------


def test_a_bad_clip_is_named_by_its_message(model: KimiAudio, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"message 1: .*empty\.wav"):
        model.generate([*ASK, {"role": "user", "message_type": "audio", "content": str(tmp_path / "empty.wav")}])


@pytest.mark.parametrize(
    "options",
    [
        {"audio_temprature": 1.0},
        {"seed": -1},
        {"preset": "fast"},
        {"max_new_tokens": 0},
        {"text_temperature": float("nan")},
        {"seed": "7"},
        {"max_new_tokens": 2.5},
    ],
    ids=str,
)
def test_wrong_options_are_refused(model: KimiAudio, options: dict) -> None:
    with pytest.raises(ParameterError):
        model.generate(ASK, **options)


def test_numpy_integers_are_integers(model: KimiAudio) -> None:
    answers = [
        model.generate(ASK, max_new_tokens=kind(6), seed=kind(3), text_temperature=1.0)[1] for kind in (int, np.int64)
    ]
    assert answers[0] == answers[1]


def test_what_is_said_must_be_text(model: KimiAudio) -> None:
    with pytest.raises(ParameterError, match="string"):
        model.say(5)


def test_wrong_output_type_is_refused(model: KimiAudio) -> None:
    with pytest.raises(ParameterError, match="output_type"):
        model.generate(ASK, "audio")


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:99", 7.5])
def test_devices_that_are_not_there_are_refused(device) -> None:
    with pytest.raises(ParameterError, match="device"):
        KimiAudio(golden("e2e") / "model", device=device)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.float64])
def test_dtypes_that_do_not_work_are_refused(dtype) -> None:
    with pytest.raises(ParameterError, match="dtype"):
        KimiAudio(golden("e2e") / "model", dtype=dtype)


def test_upstreams_own_call_ports_by_its_import() -> None:
    model = KimiAudio(model_path=str(golden("e2e") / "model"), load_detokenizer=True)
    sampling_params = {
        "audio_temperature": 0.8,
        "audio_top_k": 10,
        "text_temperature": 0.0,
        "text_top_k": 5,
        "audio_repetition_penalty": 1.0,
        "audio_repetition_window_size": 64,
        "text_repetition_penalty": 1.0,
        "text_repetition_window_size": 16,
        "max_new_tokens": 12,
    }
    wav, text = model.generate(ASK, **sampling_params, output_type="both")
    assert wav.detach().cpu().view(-1).numpy().dtype == np.float32
    assert isinstance(text, str)


# ---- saving memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def without_detokenizer(tiny_copy: Path) -> Path:
    """A checkpoint whose detokenizer files would fail to open."""
    for folder in ("audio_detokenizer", "vocoder"):
        for path in (tiny_copy / folder).iterdir():
            path.write_bytes(b"not to be read")
    return tiny_copy


def test_text_needs_no_detokenizer_files(without_detokenizer: Path) -> None:
    model = KimiAudio(without_detokenizer, load_detokenizer=False)
    wav, text = model.generate(ASK, "both", max_new_tokens=8, seed=0)
    assert wav is None
    assert isinstance(text, str)
    with pytest.raises(ParameterError, match="load_detokenizer"):
        model.say("Hello")
    with pytest.raises(CheckpointError):
        KimiAudio(without_detokenizer)


def test_text_only_gives_the_same_text_without_the_audio_branch(tiny: Path) -> None:
    small, whole = KimiAudio(tiny, text_only=True), KimiAudio(tiny)
    answers = [model.generate(ASK, "text", max_new_tokens=20)[1] for model in (small, whole)]
    assert answers[0] == answers[1]
    assert small.detokenizer is None
    assert not any(name.startswith(("model.mimo", "mimo")) for name, _ in small.lm.named_parameters())
    with pytest.raises(ParameterError, match="text only"):
        small.stream(ASK, "both")


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, True), ({"load_detokenizer": False}, False), ({"text_only": True}, False)]
)
def test_only_what_is_needed_is_fetched(tiny: Path, monkeypatch, options: dict, wanted: bool) -> None:
    asked = []
    real = kimia.pipeline.open_checkpoint
    monkeypatch.setattr(kimia.pipeline, "open_checkpoint", lambda *a, **k: asked.append(k) or real(*a, **k))
    KimiAudio(tiny, **options)
    assert asked == [{"detokenizer": wanted}]
