"""Voices: the cache makes sound once and refuses what is no speech; real engines speak where they are installed."""

import numpy as np
import pytest
import soundfile

from kimia.errors import AudioError, ParameterError
from training import voices
from training.voices import CALLERS, SPEAKER, SPEECH_RATE, STRANGERS, VOICES, Cache, Voice, is_installed, synthesize

pytestmark = pytest.mark.unit


@pytest.fixture
def spoken(monkeypatch):
    """An engine of tones, and what it was asked to say."""
    said = []

    def speak(voice, text):
        said.append(text)
        return 2.0 * np.sin(np.arange(16000) * 0.1).astype(np.float32), 16000

    monkeypatch.setitem(voices.ENGINES, "tones", speak)
    return said


TONES = Voice("tones", "tones")


def test_voices_have_names_of_their_own_and_strangers_are_not_trained_on():
    assert len({voice.name for voice in VOICES}) == len({voice.key for voice in VOICES}) == len(VOICES)
    assert all(voice.seen for voice in (SPEAKER, *CALLERS))
    assert not any(voice.seen for voice in STRANGERS)


def test_speech_comes_at_one_rate_and_below_full_scale(spoken):
    wave = synthesize(TONES, "hello")
    assert wave.dtype == np.float32
    assert abs(len(wave) - SPEECH_RATE) <= 1
    assert 0.85 < np.abs(wave).max() < 1.0


@pytest.mark.parametrize(
    ("text", "read"), [("where are you", "where are you?"), ("thank you goodbye", "thank you goodbye.")]
)
def test_engines_read_punctuated_texts(spoken, text, read):
    synthesize(TONES, text)
    assert spoken == [read]


def test_the_cache_speaks_once(spoken, tmp_path):
    cache = Cache(tmp_path)
    first = cache.speech(TONES, "hello")
    again = Cache(tmp_path).speech(TONES, "hello")
    np.testing.assert_array_equal(first, again)
    assert len(spoken) == 1
    cache.speech(TONES, "goodbye")
    assert len(spoken) == 2


def test_a_damaged_file_is_refused_with_what_to_do(spoken, tmp_path):
    cache = Cache(tmp_path)
    cache.speech(TONES, "hello")
    cache.path(TONES, "hello").write_bytes(b"no sound")
    with pytest.raises(AudioError, match="delete it"):
        cache.speech(TONES, "hello")


def test_sound_of_another_rate_is_refused(tmp_path):
    cache = Cache(tmp_path)
    path = cache.path(TONES, "hello")
    path.parent.mkdir()
    soundfile.write(path, np.zeros(100), 8000)
    with pytest.raises(AudioError, match="24000 Hz"):
        cache.speech(TONES, "hello")


def test_an_engine_that_gives_nothing_is_refused(monkeypatch):
    monkeypatch.setitem(voices.ENGINES, "tones", lambda voice, text: (np.zeros(0, np.float32), 16000))
    with pytest.raises(AudioError, match="no usable sound"):
        synthesize(TONES, "hello")


def test_an_unknown_engine_is_refused():
    with pytest.raises(ParameterError, match="engine"):
        synthesize(Voice("x", "gramophone"), "hello")


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(AudioError, match="not installed"):
        voices._run(["kimia-no-such-program"])


def test_a_program_that_fails_is_named():
    with pytest.raises(AudioError, match="could not speak"):
        voices._run(["false"])


@pytest.mark.parametrize("voice", [SPEAKER, CALLERS[0], CALLERS[3], STRANGERS[1]], ids=lambda voice: voice.name)
def test_a_real_voice_speaks(voice):
    if not is_installed(voice):
        pytest.skip(f"{voice.engine} is not installed (extra `training`, Debian packages)")
    wave = synthesize(voice, "yes")
    assert 0.2 * SPEECH_RATE < len(wave) < 3 * SPEECH_RATE
