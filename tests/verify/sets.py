"""Golden sets for tests: cut-down copies of the committed ones, and small ones written here for the other stages.

What is written here comes from formulations of its own where there are any (the plain language model in float64, the
windows' and sinusoids' formulas), else from the library: then only names, shapes and derived sizes are tested.
"""

import base64
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from kimia.model.bigvgan import mel_spectrogram
from kimia.model.config import LMConfig
from kimia.model.crossfade import ReleaseSeam
from kimia.model.detokenize import Detokenizer
from kimia.model.dit import DiT
from kimia.model.flow import solve, time_grid
from kimia.model.lm import Row
from kimia.model.presets import Preset
from kimia.verify import verify
from tests.golden_data import COMMITTED
from tests.model.tiny_detokenizer import FLOW, VOCODER, counted_noise, random_detokenizer
from tests.model.tiny_lm import CONFIG, PlainLM, random_lm

SMALLEST = {"tokenizer": "silence_1s", "e2e": "text_only_short_both"}  # committed cases that run in a moment


def report(folder: Path) -> dict[str, str]:
    """Status of every case in a folder, by its name."""
    return {outcome.name: outcome.status for outcome in verify(folder)}


def unreadable(folder: Path) -> dict[str, str]:
    """What is said of each case whose data cannot be read, by its name, and of each list of cases by its folder's."""
    outcomes = [outcome for outcome in verify(folder) if outcome.unreadable]
    assert {outcome.status for outcome in outcomes} <= {"FAIL", "ERROR"}
    return {outcome.name: outcome.detail for outcome in outcomes}


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensor(path: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change one stored tensor in place."""
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path)


def committed(stage: str, folder: Path, case: str = "") -> Path:
    """A copy of the committed set with one case only, else the smallest."""
    copy = Path(shutil.copytree(COMMITTED / stage, folder / stage))
    edit_json(copy / "cases.json", lambda spec: _keep(spec, case or SMALLEST[stage]))
    return copy


def _keep(spec: dict[str, Any], name: str) -> None:
    spec["cases"] = [case for case in spec["cases"] if case["name"] == name]
    spec["audio"] = dict(list(spec.get("audio", {}).items())[:1])


# ---- language model ---------------------------------------------------------------------------------------------

BASE = [bytes([value]) for value in range(256)]
NAMES = (
    "<|im_msg_end|>", "<|im_media_begin|>", "<|im_media_end|>", "<|im_kimia_text_blank|>", "<|im_kimia_text_eos|>",
    "<|im_kimia_user_msg_start|>", "<|im_kimia_assistant_msg_start|>", "<|im_kimia_speech_ct_id|>",
    "<|im_kimia_speech_ctd_id|>", "[PAD]",
)  # fmt: skip
SPECIAL = {name: len(BASE) + index for index, name in enumerate(NAMES)}
OFFSET = len(BASE) + len(NAMES)
CLIPS = {"a.wav": [1, 0, 2], "b": [3]}
MESSAGES = [
    {"role": "user", "message_type": "audio", "content": "a.wav"},
    {"role": "assistant", "message_type": "audio-text", "content": ["b", "ok"]},
    {"role": "user", "message_type": "text", "content": "hi"},
]


def write_llm(folder: Path) -> Path:
    """A set of the language model whose activations come from the plain formulation in float64."""
    checkpoint, goldens = folder / "llm" / "checkpoint", folder / "llm" / "goldens"
    checkpoint.mkdir(parents=True)
    goldens.mkdir()
    lm = _write_language_model(checkpoint)
    generator = torch.Generator().manual_seed(1)
    features = {
        f"features.{name}": torch.randn(len(codes) + 1, CONFIG.adaptor_input_dim, generator=generator)
        for name, codes in CLIPS.items()
    }
    save_file(features, goldens / "audio_features.safetensors")
    audio, text, mask = _layout()
    dump(goldens / "prompts.json", _prompts(audio, text, mask))
    row = Row(audio, text, ((2, 3),), [features["features.a.wav"]])
    _write_prefill(goldens, lm, row, mask)
    _write_decode(goldens, lm, row)
    _write_sampler(goldens)
    dump(goldens / "finetune.json", {"samples": [{"key": "sample0"}]})
    return folder / "llm"


def dump(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_language_model(folder: Path) -> PlainLM:
    config = replace(CONFIG, vocab_size=OFFSET + 5, token_offset=OFFSET)
    lm = random_lm(config)
    save_file({name: tensor.contiguous() for name, tensor in lm.state_dict().items()}, folder / "model.safetensors")
    dump(folder / "config.json", _lm_config(config))
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(BASE))
    (folder / "tiktoken.model").write_text("\n".join(lines))
    dump(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": {str(token): {"content": name} for name, token in SPECIAL.items()}},
    )
    return PlainLM(lm)


def _lm_config(config: LMConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_whisper_feature": True,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "kimia_mimo_layers": config.mimo_layers,
        "kimia_mimo_transformer_from_layer_index": config.fork_layer,
        "kimia_mimo_audiodelaytokens": config.audio_delay,
        "kimia_token_offset": config.token_offset,
        "kimia_adaptor_input_dim": config.adaptor_input_dim,
        "kimia_media_begin": SPECIAL["<|im_media_begin|>"],
        "kimia_media_end": SPECIAL["<|im_media_end|>"],
        "pad_token_id": SPECIAL["[PAD]"],
    }


def _layout() -> tuple[list[int], list[int], list[int]]:
    """MESSAGES written out by hand for a delay of 3: audio ids, text ids, mask."""
    end, begin, close, blank, _, user, assistant, _, ctd, _ = SPECIAL.values()
    a, b = ([OFFSET + code for code in codes] for codes in CLIPS.values())
    audio = [user, begin, *a, close, ctd, end, assistant, blank, blank, blank, *b, end, user, blank, blank, end]
    text = [blank] * 9 + [ord("o"), ord("k"), blank, blank, blank] + [blank, ord("h"), ord("i"), blank]
    return [*audio, assistant], [*text, blank], [0, 0, 1, 1, 1, *[0] * (len(audio) - 4)]


def _prompts(audio: list[int], text: list[int], mask: list[int]) -> dict[str, Any]:
    end, close = SPECIAL["<|im_msg_end|>"], SPECIAL["<|im_media_end|>"]
    case = {
        "name": "history",
        "messages": MESSAGES,
        "output_type": "both",
        "add_assistant_start_msg": True,
        "audio_token_ids": audio,
        "text_token_ids": text,
        "is_continuous_mask": mask,
        "audio_loss_mask": [0] * len(mask),
        "text_loss_mask": [0] * len(mask),
        "continuous_feature_order": ["a.wav"],
    }
    given = [{"role": "user", "message_type": "audio", "content": "a.wav", "audio_tokens": [OFFSET]}]
    system = [{"role": "system", "message_type": "text", "content": "x"}]
    return {
        "special_tokens": SPECIAL,
        "pad_id": SPECIAL["[PAD]"],
        "eod_ids": [close, end],
        "audio_inputs": {name: {"codes": codes, "feature_frames": len(codes) + 1} for name, codes in CLIPS.items()},
        "text_tokens": {"": [], "<|x|>": list(b"<|x|>")},
        "cases": [case],
        "rejected": [
            {"name": "audio_tokens_given", "messages": given, "output_type": "text"},
            {"name": "system_role", "messages": system, "output_type": "text"},
        ],
    }


def _write_prefill(goldens: Path, lm: PlainLM, row: Row, mask: list[int]) -> None:
    stored = {"audio_ids": torch.tensor(row.audio_ids), "text_ids": torch.tensor(row.text_ids)}
    stored["is_continuous_mask"] = torch.tensor(mask, dtype=torch.uint8)
    for name, tensor in lm(row).items():
        stored[name] = tensor[-2:].float() if name.endswith("logits") else tensor.float()
    keys, values = lm.kv[f"model.mimo_layers.{CONFIG.mimo_layers - 1}"]
    slot = CONFIG.layers + CONFIG.mimo_layers - 1
    stored |= {f"kv.{slot}.k": keys.float(), f"kv.{slot}.v": values.float()}
    named = {f"history.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file(named, goldens / "prefill.safetensors")
    case = {"prompt_case": "history", "features": True, "length": len(mask)}
    dump(goldens / "prefill.json", {"cases": {"history": case}})


def _write_decode(goldens: Path, lm: PlainLM, row: Row, steps: int = 5) -> None:
    """A greedy run whose every step is a whole pass of the plain model."""
    blank, delay = SPECIAL["<|im_kimia_text_blank|>"], CONFIG.audio_delay
    audio, text, raw, logits = [], [], {"text": [], "audio": []}, {"text": [], "audio": []}
    for step in range(steps):
        grown = Row([*row.audio_ids, *audio], [*row.text_ids, *text], row.segments, row.features)
        activations = lm(grown)
        for track, rows in logits.items():
            rows.append(activations[f"{track}_logits"][-1].float())
            raw[track].append(int(rows[-1].argmax()))
        text.append(raw["text"][-1])
        audio.append(raw["audio"][-1] if step >= delay else blank)
    legal = [token for token in text if token < OFFSET]
    run = {
        "name": "history_both",
        "messages": MESSAGES,
        "output_type": "both",
        "max_new_tokens": steps,
        "sampling": {},
        "stop": "max_new_tokens",
        "steps": steps,
        "prompt_audio_ids": row.audio_ids,
        "raw_text": raw["text"],
        "raw_audio": raw["audio"],
        "text_stream": text,
        "audio_stream": audio,
        "returned_text": text,
        "returned_audio": audio[delay:],
        "filtered_text_ids": legal,
        "filtered_audio_codes": [token - OFFSET for token in audio[delay:] if token >= OFFSET],
    }
    zero = lm(Row([*row.audio_ids, blank], [*row.text_ids, 0], row.segments, row.features))
    stored = {f"history_both.{track}_logits": torch.stack(rows) for track, rows in logits.items()}
    for track in logits:
        right = zero[f"{track}_logits"][-1].float()
        stored[f"text_id_zero_step.fixed.{track}_logits"] = right
        stored[f"text_id_zero_step.upstream.{track}_logits"] = right + 9
    save_file(stored, goldens / "decode_logits.safetensors")
    step = {"prompt_case": "history", "features": True, "fed_audio_id": blank, "fed_text_id": 0}
    api = {"name": "short", "messages": MESSAGES, "output_type": "text", "kwargs": {"max_new_tokens": 2}, "steps": 2,
           "detokenizer_calls": [], "wav_is_none": True}  # fmt: skip
    dump(goldens / "decode.json", {"runs": [run], "generate_api": [api], "text_id_zero_step": step})


def _write_sampler(goldens: Path) -> None:
    logits = torch.tensor([1.0, -math.inf, 3.0, 2.0])
    penalised = torch.tensor([1.0, -math.inf, 1.5, 2.0])  # id 2 stands in the window of 2, penalty 2
    chosen = (penalised[[3, 2]] / 0.5).exp()
    stored = {
        "logits": logits,
        "penalised_logits": penalised,
        "logprobs": penalised - penalised.exp().sum().log(),
        "probs": torch.stack([torch.tensor(0.0), torch.tensor(0.0), *(chosen / chosen.sum()).flip(0)]),
    }
    save_file({f"case0.{name}": tensor for name, tensor in stored.items()}, goldens / "sampler.safetensors")
    case = {"key": "case0", "name": "penalty", "temperature": 0.5, "top_k": 2, "repetition_penalty": 2.0, "window": 2,
            "recent": [0, 1, 2], "candidates": [3, 2]}  # fmt: skip
    dump(goldens / "sampler.json", {"cases": [case]})


# ---- detokenizer ------------------------------------------------------------------------------------------------

LOOK_AHEAD, UPSAMPLE, CHUNKS, PROMPT = 2, 6, (5, 3, 4), 8  # tokens, frames per token, tokens per push, prompt frames


def write_detokenizer(folder: Path) -> Path:
    """A set of the detokenizer: two streams, parts, a time grid."""
    folder = folder / "detokenizer"
    folder.mkdir(parents=True)
    detokenizer = random_detokenizer(UPSAMPLE)
    _write_detokenizer_checkpoint(folder / "weights", detokenizer)
    wave = (torch.randn(PROMPT * VOCODER.hop + 20, generator=torch.Generator().manual_seed(5)) * 3000).short()
    save_file({"pcm": wave}, folder / "voice.safetensors")
    prefill = {"chunk_size": 3, "frames": PROMPT, "wav": f"voice.safetensors:pcm[:{len(wave) - 4}] / 32767"}
    case = {"chunks": list(CHUNKS), "ode_step": 4, "solver": "naive_euler", "max_kv_cache_tokens": 20,
            "max_pos_size": 60, "prefill": prefill, "file": "voice_stream.safetensors"}  # fmt: skip
    case |= _write_stream(folder / case["file"], detokenizer, wave[:-4].float() / 32767)
    plain = {"chunks": [1], "ode_step": 2, "wav_dtype": None}
    noise, tokens = counted_noise(0, (UPSAMPLE, FLOW.mel_bins)).half(), torch.tensor([7])
    save_file({"tokens": tokens, "chunk0.noise": noise}, folder / "stream_short.safetensors")
    defect = {**case, "reproduces_upstream_defect": True}
    dump(
        folder / "goldens.json",
        {
            "checkpoint": "weights/",
            "look_ahead_tokens": LOOK_AHEAD,
            "upsample": UPSAMPLE,
            "tolerances_float32": {"dit": 5e-5, "mel": 2e-4, "wav": 1e-4, "mel_extraction": 1e-4},
            "cases": {"voice": case, "short": plain, "defect": defect, "x_upstream": plain, "x_fixed": plain},
        },
    )
    save_file(_parts(detokenizer), folder / "unit.safetensors")
    shutil.copy(folder / "stream_short.safetensors", folder / "stream_x_fixed.safetensors")
    euler = {"evals": 2, "t_float": [0.0, 0.5], "t_index": [0, 500]}
    naive = {"evals": 3, "t_index": [0, 500, 1000], "step": (1 - 1e-4) / 3}
    dump(folder / "time_grid.json", {"3": {"neural_ode_euler": euler, "naive_euler": naive}})
    return folder


def _write_detokenizer_checkpoint(root: Path, detokenizer: Detokenizer) -> None:
    flow, vocoder = root / "audio_detokenizer", root / "vocoder"
    flow.mkdir(parents=True)
    vocoder.mkdir()
    dit = {
        "input_size": FLOW.mel_bins, "semantic_vocab_size": FLOW.audio_codes, "hidden_size": FLOW.hidden_size,
        "depth": FLOW.depth, "num_heads": FLOW.heads, "mlp_ratio": FLOW.mlp_hidden / FLOW.hidden_size + 1e-9,
        "ffn_type": "vanilla_mlp", "use_rope": True, "position_embedding_type": "skip", "max_seq_len": FLOW.max_seq_len,
        "rope_params": {"rope_base": FLOW.rope_base, "rope_interpolation_factor": 1 / FLOW.rope_scale,
                        "max_position_embeddings": FLOW.max_positions},
    }  # fmt: skip
    config = {"normalize_mel": True, "mel_mean": FLOW.mel_mean, "mel_std": FLOW.mel_std, "model": {"dit": dit}}
    (flow / "config.yaml").write_text(yaml.safe_dump(config))
    state = {f"speech_model.{name}": tensor for name, tensor in detokenizer.dit.state_dict().items()}
    torch.save({"state_dict": state}, flow / "model.pt")
    names = {
        "num_mels": "mel_bins", "upsample_rates": "upsample_rates", "upsample_kernel_sizes": "upsample_kernels",
        "upsample_initial_channel": "initial_channels", "resblock_kernel_sizes": "resblock_kernels",
        "resblock_dilation_sizes": "resblock_dilations", "activation": "activation", "snake_logscale": "snake_logscale",
        "use_bias_at_final": "bias_at_final", "use_tanh_at_final": "tanh_at_final", "n_fft": "n_fft", "hop_size": "hop",
        "win_size": "win", "sampling_rate": "sample_rate", "fmin": "fmin", "fmax": "fmax",
    }  # fmt: skip
    dump(vocoder / "config.json", {"resblock": "1"} | {name: getattr(VOCODER, of) for name, of in names.items()})
    torch.save({"generator": dict(detokenizer.vocoder.state_dict())}, vocoder / "model.pt")


def _write_stream(path: Path, detokenizer: Detokenizer, wave: torch.Tensor) -> dict[str, Any]:
    """Stream behind a prompt; the fields that the run adds to its case."""
    preset = Preset(
        name="golden", commits=(3,), look_ahead=LOOK_AHEAD, waits_for_next=True, seam=ReleaseSeam(), prompt_padding=0.0,
        max_positions=60, kv_window=20, ode_points=4, solver="naive_euler",
    )  # fmt: skip
    noise = {}

    def keep(chunk: int, shape: tuple[int, int]) -> torch.Tensor:
        noise[f"chunk{chunk}.noise"] = counted_noise(chunk, shape).half()
        return noise[f"chunk{chunk}.noise"].float()

    synthesis = detokenizer.stream(preset, 0, keep)
    tokens = torch.arange(sum(CHUNKS)) % FLOW.audio_codes
    prompt = torch.arange(PROMPT) % FLOW.audio_codes
    synthesis.prefill(wave, prompt.tolist(), 3)
    stored, counters, begin = {"tokens": tokens, "prefill.tokens_50hz": prompt}, [], 0
    for index, count in enumerate(CHUNKS):
        pcm = synthesis.push(tokens[begin : begin + count].tolist(), index + 1 == len(CHUNKS))
        begin += count
        stored |= {
            f"chunk{index}.mel": synthesis.report.mel.clone(),
            f"chunk{index}.wav": (pcm.clamp(-1, 1) * 32767).round().short(),
        }
        counters.append({"frames_in": synthesis.report.frames_in, "kv_tokens_after": synthesis.report.kv_frames_after})
    save_file(stored | noise, path)
    total = sum(CHUNKS) * UPSAMPLE * VOCODER.hop
    return {"per_chunk": counters, "total_samples": total, "expected_samples": total}


@torch.no_grad()
def _parts(detokenizer: Detokenizer) -> dict[str, torch.Tensor]:
    dit, vocoder, generator = detokenizer.dit, detokenizer.vocoder, torch.Generator().manual_seed(9)
    times = torch.tensor([0, 3])
    angles = times[:, None] * 10000 ** (-torch.arange(128) / 128)
    noise, tokens = torch.randn(6, FLOW.mel_bins, generator=generator), torch.arange(6)
    mel, wave = torch.randn(4, VOCODER.mel_bins, generator=generator), torch.randn(50, generator=generator)
    activation, x = vocoder.get_submodule("resblocks.0.activations.0"), torch.randn(4, 7, generator=generator)
    parts = {
        "time.t": times,
        "time.sinusoid": torch.cat([angles.cos(), angles.sin()], dim=1),
        "time.emb": dit.embed_times((0, 3)),
        "ode.noise": noise,
        "ode.tokens": tokens,
        "vocoder.mel": mel,
        "vocoder.wav": vocoder(mel.T[None])[0],
        "snake.x": x,
        "snake.y": activation(x[None])[0],
        "snake.filter_up": activation.upsample.filter.flatten(),
        "hamming.10_first3": 0.54 - 0.46 * torch.cos(2 * math.pi * torch.arange(3) / 10),
        "mel7.wav": wave,
        "mel7.mel": mel_spectrogram(wave, VOCODER),
        "novelty.x": x.clone(),
    }
    for name, points, solver in (("ode5", 5, "neural_ode_euler"), ("naive2", 2, "naive_euler")):
        x = solve(dit, noise[None], dit.chunk(tokens[None], 1, 0, dit.empty_prefix()), time_grid(points, solver))
        parts[f"{name}.mel"] = x[0] * FLOW.mel_std + FLOW.mel_mean
    return {name: tensor.contiguous() for name, tensor in (parts | _evaluations(dit)).items()}


def _evaluations(dit: DiT) -> dict[str, torch.Tensor]:
    """Two evaluations, the second behind the first, and a third that starts anew."""
    stored, prefix = {}, dit.empty_prefix()
    for name, start, frames in (("a", 4, 3), ("b", 7, 2), ("c", 0, 2)):
        if name == "c":
            prefix = dit.empty_prefix()
        x = counted_noise(start, (frames, FLOW.mel_bins))
        chunk = dit.chunk(torch.arange(frames)[None], 1, start, prefix)
        velocity = dit(x[None], dit.embed_times((321,)), chunk)[0]
        prefix = chunk.cache
        stored |= {
            f"dit.{name}.x": x,
            f"dit.{name}.tokens": torch.arange(frames),
            f"dit.{name}.t": torch.tensor(321),
            f"dit.{name}.start_position": torch.tensor(start),
            f"dit.{name}.velocity": velocity,
            f"dit.{name}.layer1_k": prefix.keys[1, 0, :, -frames:].transpose(0, 1).contiguous(),
        }
    return stored
