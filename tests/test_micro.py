"""The micro checkpoint that the repository ships: it loads as any release does, hears strangers, remembers, speaks."""

from pathlib import Path

import numpy as np
import pytest

from kimia.model.checkpoint import open_checkpoint
from kimia.model.instructions import TRANSCRIBE
from kimia.model.presets import LOW_LATENCY
from kimia.pipeline import AudioChunk, KimiAudio, TurnDone
from training.config import LIMIT_BYTES, micro_configs, weight_bytes

pytestmark = pytest.mark.unit

MICRO = Path(__file__).parents[1] / "checkpoints" / "micro"
EXAMPLES = MICRO / "examples"
GREEDY = {"text_temperature": 0.0, "audio_temperature": 0.0, "seed": 1}


@pytest.fixture(scope="module")
def micro():
    return KimiAudio(MICRO, device="cpu")  # strictly: every tensor of the layout, and no other


def said(name):
    return {"role": "user", "message_type": "audio", "content": str(EXAMPLES / f"{name}.wav")}


def written(text):
    return {"role": "user", "message_type": "text", "content": text}


def test_it_is_small_and_has_the_sizes_of_its_trainer():
    files = [path for path in MICRO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    stored = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".pt", ".pth"))
    assert stored >= sum(weight_bytes(micro_configs()).values())
    assert open_checkpoint(MICRO).root == MICRO


@pytest.mark.parametrize("instruction", ["please write down what you hear", TRANSCRIBE])
@pytest.mark.parametrize(
    ("name", "text"),
    [("order", "hello where is my order zero four five"), ("hours", "what time do you open on tuesday")],
)
def test_it_writes_down_what_a_stranger_says(micro, name, text, instruction):
    _, heard = micro.generate([written(instruction), said(name)], **GREEDY)
    assert heard == text


def test_with_int8_weights_it_hears_and_answers_the_same():
    small = KimiAudio(MICRO, load_detokenizer=False, device="cpu", quantize="int8")
    _, heard = small.generate([written("please write down what you hear"), said("order")], **GREEDY)
    assert heard == "hello where is my order zero four five"
    *_, done = small.stream([said("order")], **GREEDY)
    assert done.text == "order zero four five was delivered yesterday"
    assert done.stop == "audio_eod"


def test_it_answers_in_text_and_speech_and_streams_what_it_would_say_at_once(micro):
    *pieces, done = micro.stream([said("order")], preset="low-latency", **GREEDY)
    assert isinstance(done, TurnDone)
    assert done.stop == "audio_eod"
    assert done.text == "order zero four five was delivered yesterday"
    sound = np.concatenate([piece.pcm for piece in pieces if isinstance(piece, AudioChunk)])
    whole = micro.detokenizer.synthesize(done.result.audio_codes, LOW_LATENCY, 1)
    np.testing.assert_array_equal(sound, whole.numpy())
    assert 1.0 < len(sound) / micro.sample_rate < 6.0


def test_it_remembers_over_turns(micro):
    *_, done = micro.stream([said("number")], **GREEDY)
    *_, again = micro.stream([said("number"), done.message(), said("recall")], **GREEDY)
    assert again.text == "your order number is one two three"
