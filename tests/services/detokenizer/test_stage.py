"""The detokenizer stage alone: chunks, resumption, interleaving, and codes that are none."""

import asyncio

import numpy as np
import pytest

from kimia.errors import ParameterError, StateError
from kimia.model.detokenize import Synthesis
from kimia.model.preset_file import adopt
from kimia.model.presets import PRESETS, find_preset
from kimia.runtime.settings import Settings
from kimia.sound import to_s16
from kimia.v1.turn_pb2 import Chunk, Step
from services.detokenizer.stage import DetokenizerStage
from tests.golden_data import golden
from tests.model.preset_files import forgetful, written
from tests.services.turns import ran, replayed, turn

pytestmark = pytest.mark.parity

__all__ = ["forgetful"]

CODES = [7 * index % 50 for index in range(75)]


@pytest.fixture
def stage(stages) -> DetokenizerStage:
    return stages["detokenizer"]


def steps(codes: list[int], delay: int = 2) -> list[Chunk]:
    """The log of an answer with these codes: blanks first, a blank among them, and an end without a code."""
    made = [Step() for _ in range(delay)] + [Step(code=code) for code in codes]
    made.insert(len(made) // 2, Step(text_id=5))
    made.append(Step())
    return [Chunk(index=index, step=step, final=index + 1 == len(made)) for index, step in enumerate(made)]


def speech(seed: int = 1, preset: str = "low-latency"):
    return turn([], "detokenizer", seed, preset=preset)


def without_time(chunks: list[Chunk]) -> list[Chunk]:
    for chunk in chunks:
        chunk.report.compute_seconds = 0
    return chunks


# ---- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
async def test_all_codes_become_speech(stage: DetokenizerStage, preset: str) -> None:
    chunks = await ran(stage, speech(preset=preset), steps(CODES))
    whole = stage.detokenizer.synthesize(CODES, PRESETS[preset], seed=1).numpy()
    assert b"".join(chunk.speech.pcm for chunk in chunks) == to_s16(whole).tobytes()
    assert len(whole) == len(CODES) * stage.detokenizer.samples_per_token
    assert {chunk.speech.sample_rate for chunk in chunks} == {stage.detokenizer.sample_rate}
    assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.speech.pcm for chunk in chunks)
    assert chunks[-1].report.units == len(CODES)
    assert chunks[-1].report.compute_seconds > 0


@pytest.mark.usefixtures("forgetful")
async def test_a_preset_of_a_file_is_spoken_and_taken_over(stage: DetokenizerStage, tmp_path) -> None:
    adopt([written(tmp_path)], "calm")
    chunks = await ran(stage, speech(preset=""), steps(CODES[:40]))
    whole = stage.detokenizer.synthesize(CODES[:40], find_preset("calm"), seed=1).numpy()
    assert b"".join(chunk.speech.pcm for chunk in chunks) == to_s16(whole).tobytes()
    rest = await ran(stage, speech(preset="calm"), steps(CODES[:40]), chunks[:2])
    assert without_time(rest) == without_time(chunks)[2:]


async def test_the_first_chunk_leaves_with_the_code_that_completes_it(stage: DetokenizerStage) -> None:
    given = 0

    async def inbox():
        nonlocal given
        for chunk in steps(CODES, delay=0):
            given += 1
            yield chunk

    chunks = stage.run(speech(), inbox())
    assert (await anext(chunks)).speech.pcm
    assert given == 10  # six codes to be spoken and four to look ahead
    await chunks.aclose()


async def test_without_a_code_the_end_is_silent(stage: DetokenizerStage) -> None:
    [chunk] = await ran(stage, speech(), steps([]))
    assert chunk.final
    assert chunk.speech.pcm == b""
    assert chunk.report.units == 0


async def test_a_final_step_may_bring_the_last_code(stage: DetokenizerStage) -> None:
    log = [Chunk(index=index, step=Step(code=code), final=index == 9) for index, code in enumerate(CODES[:10])]
    chunks = await ran(stage, speech(), log)
    assert sum(len(chunk.speech.pcm) for chunk in chunks) == 10 * 2 * stage.detokenizer.samples_per_token


async def test_the_seed_decides(stage: DetokenizerStage) -> None:
    one, again, two = [await ran(stage, speech(seed), steps(CODES[:8])) for seed in (1, 1, 2)]
    assert without_time(one) == without_time(again)
    assert one[0].speech.pcm != two[0].speech.pcm


# ---- again ------------------------------------------------------------------------------------------------------


def without_mels(chunks: list[Chunk], gone: set[int]) -> list[Chunk]:
    copies = [Chunk.FromString(chunk.SerializeToString()) for chunk in chunks]
    for index in gone & set(range(len(copies))):
        copies[index].speech.ClearField("mel")
    return copies


def solved(monkeypatch) -> list[int]:
    """Gets the tokens of every push that begins from now on."""
    tokens_of: list[int] = []
    begin = Synthesis.begin

    def noted(synthesis, tokens, final=False):
        begun = begin(synthesis, tokens, final)
        tokens_of.append(begun.tokens)
        return begun

    monkeypatch.setattr(Synthesis, "begin", noted)
    return tokens_of


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gone", [set(), {1}, set(range(9))], ids=["none", "second", "all"])
async def test_every_interrupted_run_goes_on_as_if_undisturbed(
    stage: DetokenizerStage, preset: str, gone: set[int], monkeypatch
) -> None:
    """From the committed mels as far as they are there; without them by the plain twin, all over again."""
    log = steps(CODES[:45])
    begun = solved(monkeypatch)
    whole = without_time(await ran(stage, speech(preset=preset), log))
    once = list(begun)
    assert len(whole) > 1
    assert [bool(chunk.speech.mel) for chunk in whole] == [True] * (len(whole) - 1) + [False]
    for given in range(1, len(whole) + 1):
        begun.clear()
        rest = without_time(await ran(stage, speech(preset=preset), log, without_mels(whole[:given], gone)))
        assert rest == whole[given:]
        known = min([given, *gone])
        assert begun == ([] if given == len(whole) else once[known:])


async def test_a_mel_of_something_else_ends_the_turn(stage: DetokenizerStage) -> None:
    log = steps(CODES[:45])
    whole = await ran(stage, speech(), log)
    whole[1].speech.mel = whole[0].speech.mel
    with pytest.raises(ParameterError, match="push 1"):
        await ran(stage, speech(), log, whole[:2])


async def test_two_turns_at_once_are_as_each_alone(stage: DetokenizerStage) -> None:
    logs = [steps(CODES[:30]), steps(CODES[20:60])]
    alone = [without_time(await ran(stage, speech(seed), log)) for seed, log in enumerate(logs)]
    together = await asyncio.gather(*(ran(stage, speech(seed), log) for seed, log in enumerate(logs)))
    assert [without_time(chunks) for chunks in together] == alone


# ---- what is refused --------------------------------------------------------------------------------------------


async def test_a_code_that_is_none_is_refused_as_it_comes(stage: DetokenizerStage) -> None:
    log = [Chunk(step=Step(code=3)), Chunk(step=Step(code=stage.detokenizer.codes))]
    with pytest.raises(ParameterError, match="semantic token 1"):
        await ran(stage, speech(), log)


async def test_other_mistakes(stage: DetokenizerStage) -> None:
    with pytest.raises(ParameterError, match="preset"):
        await ran(stage, speech(preset="fast"), steps(CODES))
    with pytest.raises(ParameterError, match="seed"):
        await ran(stage, speech(seed=1 << 63), steps(CODES))
    with pytest.raises(StateError, match="`tokens`"):
        await ran(stage, speech(), steps(CODES)[:-1])


async def test_a_closed_turn_computes_no_more(stage: DetokenizerStage, monkeypatch) -> None:
    chunks = stage.run(speech(), replayed(steps(CODES)))
    await anext(chunks)
    await chunks.aclose()
    monkeypatch.setattr(type(stage.detokenizer.vocoder), "forward", lambda *args: pytest.fail("computed"))
    await stage.compute.turn().run(len, ())


# ---- as a process loads it --------------------------------------------------------------------------------------


async def test_loaded_by_settings_and_warmed_up(stage: DetokenizerStage) -> None:
    loaded = DetokenizerStage.load(Settings(model=str(golden("e2e") / "model"), device="cpu", threads=1))
    await loaded.warm_up()
    here, there = await ran(stage, speech(), steps(CODES[:12])), await ran(loaded, speech(), steps(CODES[:12]))
    assert without_time(here) == without_time(there)
    assert np.frombuffer(here[0].speech.pcm, "<i2").any()
    loaded.compute.close()
    loaded.vocoder.close()
