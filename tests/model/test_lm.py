"""The dual-track model against golden activations and against its plain formulation."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia.errors import AudioError, ParameterError, WeightsError
from kimia.model import lm as module
from kimia.model.lm import Activations, DualTrackLM, Row, last_position, load_lm, rotary_tables, stack
from tests.golden_data import golden, golden_json
from tests.model.tiny_lm import CONFIG, PlainLM, golden_or, random_lm, random_row, runs

pytestmark = pytest.mark.parity

TOLERANCE = {"atol": 5e-5, "rtol": 0}
NAMES = [field.name for field in dataclasses.fields(Activations)]
PREFILL = golden_or("llm", "goldens/prefill.json", {"cases": {}})["cases"]


# ---- golden activations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_lm() -> DualTrackLM:
    return load_lm(golden("llm") / "checkpoint", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(golden("llm") / "goldens/prefill.safetensors")


def golden_row(name: str, expected: dict[str, torch.Tensor]) -> Row:
    case = PREFILL[name]
    prompts = {prompt["name"]: prompt for prompt in golden_json("llm", "goldens/prompts.json")["cases"]}
    features = load_file(golden("llm") / "goldens/audio_features.safetensors")
    order = prompts[case["prompt_case"]]["continuous_feature_order"] if case["features"] else []
    return Row(
        audio_ids=expected[f"{name}.audio_ids"].tolist(),
        text_ids=expected[f"{name}.text_ids"].tolist(),
        segments=runs(expected[f"{name}.is_continuous_mask"].tolist()),
        features=[features[f"features.{clip}"] for clip in order],
    )


@pytest.mark.parametrize("name", PREFILL)
def test_golden_prefill(name, golden_lm, expected):
    cache = golden_lm.new_cache(rows=1)
    row = golden_row(name, expected)
    activations = golden_lm(stack([row], golden_lm.device), cache)
    for what in NAMES:
        wanted = expected[f"{name}.{what}"]
        torch.testing.assert_close(getattr(activations, what)[0, -len(wanted) :], wanted, **TOLERANCE)
    for key in (key for key in expected if key.startswith(f"{name}.kv.")):
        slot, kind = key.removeprefix(f"{name}.kv.").split(".")
        stored = (cache.keys if kind == "k" else cache.values)[int(slot)]
        torch.testing.assert_close(stored[0, :, : len(row.text_ids)], expected[key], **TOLERANCE)


def test_golden_step_with_text_id_zero(golden_lm, expected):
    """Token 0 is text, not absence of text."""
    case = golden_json("llm", "goldens/decode.json")["text_id_zero_step"]
    logits = load_file(golden("llm") / "goldens/decode_logits.safetensors")
    cache = golden_lm.new_cache(rows=1)
    golden_lm(stack([golden_row(case["prompt_case"], expected)], golden_lm.device), cache)
    assert cache.lengths == (case["position"],)
    step = golden_lm(stack([Row([case["fed_audio_id"]], [case["fed_text_id"]])], golden_lm.device), cache)
    for track in ("text", "audio"):
        wanted = logits[f"text_id_zero_step.always_add.{track}_logits"]
        torch.testing.assert_close(getattr(step, f"{track}_logits")[0, -1], wanted, **TOLERANCE)


# ---- the plain formulation --------------------------------------------------------------------------------------


ROWS = {
    "ids only": random_row(9, seed=1),
    "one segment": random_row(9, seed=2, segments=((3, 4),)),
    "two segments": random_row(14, seed=3, segments=((1, 3), (7, 5))),
    "segment of one code": random_row(5, seed=4, segments=((2, 1),)),
    "text ids all 0": dataclasses.replace(random_row(3, seed=8), text_ids=(0, 0, 0)),
}


@pytest.fixture(scope="module")
def lm() -> DualTrackLM:
    return random_lm()


@pytest.mark.parametrize("name", ROWS)
def test_equals_the_plain_formulation(name, lm):
    plain = PlainLM(lm)
    wanted = plain(ROWS[name])
    cache = lm.new_cache(rows=1)
    activations = lm(stack([ROWS[name]], lm.device), cache)
    for what in NAMES:
        torch.testing.assert_close(getattr(activations, what)[0].double(), wanted[what], **TOLERANCE)
    slots = [f"model.layers.{i}" for i in range(CONFIG.layers)]
    slots += [f"model.mimo_layers.{i}" for i in range(CONFIG.mimo_layers)]
    length = len(ROWS[name].text_ids)
    for slot, layer in enumerate(slots):
        for stored, kind in ((cache.keys, 0), (cache.values, 1)):
            torch.testing.assert_close(stored[slot][0, :, :length].double(), plain.kv[layer][kind], **TOLERANCE)


@pytest.mark.parametrize("fork", [0, 1, 3])
def test_the_fork_may_lie_anywhere(fork):
    lm = random_lm(dataclasses.replace(CONFIG, fork_layer=fork), seed=fork)
    row = random_row(6, seed=5)
    wanted, activations = PlainLM(lm)(row), lm(stack([row], lm.device))
    for what in NAMES:
        torch.testing.assert_close(getattr(activations, what)[0].double(), wanted[what], **TOLERANCE)


def test_layers_above_the_fork_do_not_reach_the_audio():
    lm, changed = random_lm(), random_lm()
    for layer in changed.model.layers[CONFIG.fork_layer + 1 :]:
        layer.mlp.up_proj.weight.data.mul_(2)
    tracks = stack([ROWS["one segment"]], lm.device)
    before, after = lm(tracks), changed(tracks)
    assert torch.equal(before.audio_logits, after.audio_logits)
    assert not torch.allclose(before.text_logits, after.text_logits)


def test_rotary_angles_are_float32_in_a_bfloat16_model(lm):
    cos, sin = rotary_tables(torch.tensor([[301, 4097]]), head_dim=8, theta=1e6)
    assert cos.dtype == sin.dtype == torch.float32
    angles = torch.tensor([[301.0], [4097.0]], dtype=torch.float64) * 1e6 ** -(torch.arange(4).double() / 4)
    torch.testing.assert_close(cos[0, 0, :, :4].double(), angles.cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin[0, 0, :, 4:].double(), angles.sin(), atol=1e-3, rtol=0)
    half = random_lm().to(torch.bfloat16)
    assert half.extent((3,)).cos.dtype == torch.float32


def test_bfloat16_stays_near_float32_and_rounds_the_root(lm):
    half = random_lm().to(torch.bfloat16)
    row = ROWS["one segment"]
    tracks = stack([row], lm.device)
    embeds = half.embed(tracks)
    assert embeds.dtype == torch.bfloat16
    table = half.model.embed_tokens.weight
    begin, codes = row.segments[0]
    frames = half.model.vq_adaptor(row.features[0][:codes].to(torch.bfloat16))
    root = torch.tensor(2.0, dtype=torch.bfloat16).sqrt()  # 1.4140625
    audio = (table[list(row.audio_ids[begin : begin + codes])] + frames) * root
    assert torch.equal(embeds[0, begin : begin + codes], audio + table[list(row.text_ids[begin : begin + codes])])
    wide, narrow = lm(tracks), half(tracks)
    assert (wide.fork_hidden - narrow.fork_hidden.float()).norm() < 0.1 * wide.fork_hidden.norm()


# ---- cache and batch --------------------------------------------------------------------------------------------


def tail(row: Row, begin: int, end: int) -> Row:
    return Row(row.audio_ids[begin:end], row.text_ids[begin:end])


@pytest.mark.parametrize("pieces", [(5, 1, 1, 1, 1), (1,) * 9, (4, 3, 2)])
def test_pieces_through_the_cache_equal_one_pass(pieces, lm):
    row = ROWS["ids only"]
    whole = lm(stack([row], lm.device))
    cache = lm.new_cache(rows=1)
    done, outputs = 0, []
    for length in pieces:
        outputs.append(lm(stack([tail(row, done, done + length)], lm.device), cache))
        done += length
    for what in NAMES:
        joined = torch.cat([getattr(output, what) for output in outputs], dim=1)
        torch.testing.assert_close(joined, getattr(whole, what), atol=1e-5, rtol=0)


def test_rows_do_not_feel_their_neighbours(lm):
    """Ragged prefill, then ragged decode: each row as if it were alone."""
    rows = [ROWS["one segment"], ROWS["segment of one code"], ROWS["two segments"]]
    steps = [random_row(3, seed=20 + i) for i in range(3)]
    cache = lm.new_cache(rows=3)
    together = [lm(stack(rows, lm.device), cache)]
    together += [lm(stack([tail(step, t, t + 1) for step in steps], lm.device), cache) for t in range(3)]
    assert cache.lengths == tuple(len(row.text_ids) + 3 for row in rows)
    for index, (row, step) in enumerate(zip(rows, steps, strict=True)):
        cache = lm.new_cache(rows=1)
        alone = [lm(stack([row], lm.device), cache)]
        alone += [lm(stack([tail(step, t, t + 1)], lm.device), cache) for t in range(3)]
        for shared, single in zip(together, alone, strict=True):
            for what in NAMES:
                wanted = getattr(single, what)[0]
                torch.testing.assert_close(getattr(shared, what)[index, : len(wanted)], wanted, atol=2e-5, rtol=0)


def test_last_position_is_the_last_real_one(lm):
    tracks = stack([ROWS["ids only"], ROWS["segment of one code"]], lm.device)
    hidden = torch.arange(9.0).expand(2, 9)[..., None]
    assert last_position(hidden, lm.extent(tracks.counts)).tolist() == [[8], [4]]


def test_a_branch_that_was_skipped_cannot_be_taken_up_again(lm):
    cache = lm.new_cache(rows=1)
    lm(stack([ROWS["ids only"]], lm.device), cache)
    step = stack([Row([1], [2])], lm.device)
    lm.trunk(lm.embed(step), lm.extent(step.counts, cache))
    with pytest.raises(RuntimeError, match="was skipped"):
        lm(step, cache)


# ---- continuous features ----------------------------------------------------------------------------------------


def test_features_follow_the_order_of_the_segments(lm):
    row = random_row(12, seed=6, segments=((1, 3), (6, 3)), surplus=0)
    swapped = dataclasses.replace(row, features=row.features[::-1])
    a, b = (lm.embed(stack([each], lm.device)) for each in (row, swapped))
    assert not torch.allclose(a, b)


def test_no_features_means_a_plain_sum(lm):
    row = random_row(6, seed=7, segments=((1, 3),))
    table = lm.model.embed_tokens.weight
    wanted = table[list(row.audio_ids)] + table[list(row.text_ids)]
    for features in (None, ()):
        bare = dataclasses.replace(row, features=features)
        torch.testing.assert_close(lm.embed(stack([bare], lm.device))[0], wanted, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (random_row(9, seed=1, segments=((2, 4),), surplus=-1), "4 codes but only 3"),
        (random_row(9, seed=1, segments=((2, 4),), surplus=-3), "4 codes but only 1"),  # would broadcast
        (random_row(9, seed=1, segments=((7, 4),)), "outside the 9 positions"),
        (Row([1, 2], [1, 2], [(0, 1)], [torch.zeros(1, 10), torch.zeros(1, 10)]), "1 audio segments .* 2 feature"),
        (Row([1, 2], [1, 2], [(0, 1), (1, 1)], [torch.zeros(1, 10)]), "2 audio segments .* 1 feature"),
        (Row([1, 2], [1, 2], [(0, 1)], [torch.zeros(1, 11)]), "11 wide, kimia_adaptor_input_dim is 10"),
    ],
)
def test_features_that_do_not_fit_are_refused(row, message, lm):
    with pytest.raises(AudioError, match=message):
        lm.embed(stack([row], lm.device))


def test_tracks_of_unequal_length_are_refused():
    with pytest.raises(ParameterError, match="2 audio ids, 1 text ids"):
        stack([Row([1, 2], [1])], torch.device("cpu"))


# ---- loading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """The small model as a checkpoint folder in bfloat16, with the rotary leftovers of the release."""
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    names |= {"max_positions": "max_position_embeddings", "mimo_layers": "kimia_mimo_layers"}
    names |= {"fork_layer": "kimia_mimo_transformer_from_layer_index", "audio_delay": "kimia_mimo_audiodelaytokens"}
    names |= {"token_offset": "kimia_token_offset", "adaptor_input_dim": "kimia_adaptor_input_dim"}
    names |= {"media_begin": "kimia_media_begin", "media_end": "kimia_media_end", "pad_token": "pad_token_id"}
    values = {names.get(name, name): value for name, value in dataclasses.asdict(CONFIG).items()}
    values |= {"hidden_act": "silu", "tie_word_embeddings": False, "use_whisper_feature": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in random_lm().state_dict().items()}
    for layer in ("layers.0", "mimo_layers.1"):
        tensors[f"model.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((2,), 9.0, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_loads_in_the_dtype_asked_for_and_ignores_the_rotary_leftovers(folder):
    lm = load_lm(folder, device="cpu", dtype=torch.float32)
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}
    row = ROWS["one segment"]
    torch.testing.assert_close(
        lm(stack([row], lm.device)).audio_logits[0].double(), PlainLM(lm)(row)["audio_logits"], **TOLERANCE
    )


def test_text_only_neither_reads_nor_holds_the_audio_branch(folder, monkeypatch):
    read = []
    source = module.sharded_source

    def watched(path):
        def watch(name, item):
            return dataclasses.replace(item, read=lambda: (read.append(name), item.read())[1])

        return {name: watch(name, item) for name, item in source(path).items()}

    monkeypatch.setattr(module, "sharded_source", watched)
    lm = load_lm(folder, device="cpu", dtype=torch.float32, text_only=True)
    assert read
    assert not any("mimo" in name for name in [*read, *lm.state_dict()])
    whole = load_lm(folder, device="cpu", dtype=torch.float32)
    tracks = stack([ROWS["one segment"]], lm.device)
    extent = lm.extent(tracks.counts)
    hidden = lm.trunk(lm.embed(tracks), extent)
    assert torch.equal(lm.lm_head(lm.text_branch(hidden, extent)), whole(tracks).text_logits)
    with pytest.raises(ParameterError, match="text only"):
        lm.audio_branch(hidden, extent)


@pytest.mark.parametrize("text_only", [False, True])
def test_unknown_tensors_are_refused(folder, text_only):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.mimo.stray": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"unknown: model\.mimo\.stray"):
        load_lm(folder, device="cpu", dtype=torch.float32, text_only=text_only)


def test_the_pad_row_is_never_trained():
    lm = random_lm().requires_grad_(True)
    row = Row(audio_ids=(1, CONFIG.pad_token, 2), text_ids=(CONFIG.pad_token, 3, 4))
    lm(stack([row], lm.device)).text_logits.square().sum().backward()
    gradient = lm.model.embed_tokens.weight.grad
    assert not gradient[CONFIG.pad_token].any()
    assert all(gradient[token].any() for token in (1, 2, 3, 4))
