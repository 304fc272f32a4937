"""Both streams of a recording together: equal lengths, the golden end-to-end audio, encoders that do not match."""

from dataclasses import replace

import pytest
import torch

from kimia.errors import AudioError, ConfigError
from kimia.model.audio import load_audio
from kimia.model.checkpoint import Checkpoint, open_checkpoint
from kimia.model.config import LMConfig, VQConfig
from kimia.model.encode import AudioEncoder, joined
from tests.golden_data import golden, golden_json
from tests.model.plain_encoder import (
    ENCODER,
    FEATURES,
    encoder_json,
    speech_like,
    vq_json,
    vq_weights,
    whisper_weights,
    write_folder,
)

pytestmark = pytest.mark.parity

SLOW_WHISPER = replace(ENCODER, d_model=8)
VQ = VQConfig(ENCODER, 4, "avg", 2, 2, 50, 8, causal_convolution=True, causal_attention=False)


def checkpoint(root, vq=VQ, vq_features=FEATURES):
    whisper = {f"model.encoder.{name}": tensor for name, tensor in whisper_weights(SLOW_WHISPER).items()}
    write_folder(root / "model" / "whisper-large-v3", encoder_json(SLOW_WHISPER), FEATURES, whisper)
    write_folder(root / "glm-4-voice-tokenizer", vq_json(vq), vq_features, vq_weights(vq))
    return Checkpoint(root / "model", root / "glm-4-voice-tokenizer")


def load(checkpoint, width=4 * SLOW_WHISPER.d_model, dtype=torch.float32):
    return AudioEncoder.load(checkpoint, width, "cpu", dtype)


def test_end_to_end_audio():
    cases = golden_json("e2e", "cases.json")
    found = open_checkpoint(golden("e2e") / cases["model"])
    encoder = load(found, LMConfig.read(found.root / "config.json").adaptor_input_dim)
    names = list(cases["audio"])
    encoded = encoder.encode([load_audio(golden("e2e") / name, encoder.sample_rate) for name in names])
    assert [list(audio.codes) for audio in encoded] == [cases["audio"][name]["vq_codes"] for name in names]
    assert [len(audio.features) for audio in encoded] == [len(audio.codes) for audio in encoded]


@pytest.mark.parametrize(
    ("samples", "positions"), [(1, 1), (1280, 1), (1281, 2), (32000, 25), (32001, 26), (70000, 55)]
)
def test_one_position_per_1280_samples(samples, positions, tmp_path):
    encoder = load(checkpoint(tmp_path))
    [audio] = encoder.encode([speech_like(samples)])
    assert (len(audio.codes), tuple(audio.features.shape)) == (positions, (positions, 32))
    assert (encoder.sample_rate, encoder.samples_per_position) == (16000, 1280)
    assert set(map(type, audio.codes)) == {int}


def test_streams_are_those_of_the_encoders(tmp_path):
    encoder = load(checkpoint(tmp_path))
    waves = [speech_like(5000), speech_like(40000, seed=1)]
    for wave, audio in zip(waves, encoder.encode(waves), strict=True):
        assert list(audio.codes) == encoder.vq.encode([wave])[0].tolist()
        torch.testing.assert_close(audio.features, encoder.whisper.encode([wave])[0], atol=1e-5, rtol=0)


def test_segments_one_by_one_are_the_recording_bit_by_bit_and_a_batch_is_as_good(tmp_path):
    encoder = load(checkpoint(tmp_path))
    waves = [speech_like(length, seed) for seed, length in enumerate((5000, 70000, 32000, 1))]
    whole = encoder.encode(waves)
    assert [of_wave.codes for of_wave in whole] == encoder.codes(waves)
    for wave, of_wave in zip(waves, whole, strict=True):
        alone = joined([encoder.encode_segments([segment])[0] for segment in encoder.cut(wave)])
        assert alone.codes == of_wave.codes
        assert torch.equal(alone.features, of_wave.features)
    batch = [segment for wave in waves for segment in encoder.cut(wave)]
    together = iter(encoder.encode_segments(batch))
    for wave, of_wave in zip(waves, whole, strict=True):
        found = joined([next(together) for _ in encoder.cut(wave)])
        assert found.codes == of_wave.codes
        torch.testing.assert_close(found.features, of_wave.features, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_streams_give_what_one_gives(tmp_path):
    found = checkpoint(tmp_path)
    encoder = AudioEncoder.load(found, 4 * SLOW_WHISPER.d_model, "cuda", torch.bfloat16)
    batch = [segment for seed in range(5) for segment in encoder.cut(speech_like(20000 + 9000 * seed, seed))]
    for _ in range(20):  # memory that one stream gives back and the other one takes would show
        streams, plain = encoder._both(batch), encoder._one_by_one(batch)
        for ours, theirs in zip((*streams[0], *streams[1]), (*plain[0], *plain[1]), strict=True):
            assert torch.equal(ours, theirs)


def test_codes_stay_in_float32_whatever_the_features(tmp_path):
    found = checkpoint(tmp_path)
    wave = speech_like(30000)
    [exact], [narrow] = load(found).encode([wave]), load(found, dtype=torch.bfloat16).encode([wave])
    assert narrow.features.dtype == torch.bfloat16
    assert narrow.codes == exact.codes


def test_empty_audio_is_refused(tmp_path):
    with pytest.raises(AudioError, match="no samples"):
        load(checkpoint(tmp_path)).encode([speech_like(0)])


@pytest.mark.parametrize(
    ("vq", "features", "message"),
    [
        (replace(VQ, pooling_kernel=2), FEATURES, "samples per position: 640 .* 1280"),
        (VQ, replace(FEATURES, segment_samples=16000), "segment samples: 16000 .* 32000"),
        (VQ, replace(FEATURES, sample_rate=8000, segment_samples=32000), "sampling_rate: 8000 .* 16000"),
    ],
)
def test_encoders_must_match(vq, features, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(checkpoint(tmp_path, vq, features))


def test_width_must_be_whole_frames(tmp_path):
    with pytest.raises(ConfigError, match="33 is not a multiple of 8"):
        load(checkpoint(tmp_path), width=33)
