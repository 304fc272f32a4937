"""The language model stage alone: resumption, interleaving, cancelling, the context, and what is refused."""

import asyncio

import pytest
import torch

from kimia.compute import ComputeThread
from kimia.errors import ContextLengthError, ConversationError, KimiaError, ParameterError
from kimia.model.engine import context_bytes
from kimia.model.generate import Step
from kimia.model.prefix import Prefixes
from kimia.pipeline import KimiAudio
from kimia.runtime.metrics import PREFIX_POSITIONS, PREFIX_TURNS
from kimia.runtime.settings import Settings
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, TrackSampling
from kimia.v1.turn_pb2 import STOP_REASON_MAX_NEW_TOKENS, STOP_REASON_UNSPECIFIED, Chunk, Encoded
from orchestrator.memory import answer_of
from services.llm.options import read_options
from services.llm.stage import AnswerChunks, LanguageModelStage
from tests.golden_data import golden
from tests.services.turns import QUESTION, heard, plain, ran, replayed, sound_log, text, turn

pytestmark = pytest.mark.parity

SAMPLED = {"text": TrackSampling(temperature=0.9), "audio": TrackSampling(temperature=0.9)}


@pytest.fixture
def stage(stages) -> LanguageModelStage:
    return stages["llm"]


def question(seed: int = 3, **options):
    return turn([text("How are you?")], "llm", seed, **{"max_new_tokens": 14, **SAMPLED, **options})


def without_time(chunks: list[Chunk]) -> list[Chunk]:
    for chunk in chunks:
        chunk.report.compute_seconds = 0
    return chunks


# ---- again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["low-latency", "upstream"])
async def test_every_interrupted_run_goes_on_as_if_undisturbed(stage: LanguageModelStage, preset: str) -> None:
    whole = without_time(await ran(stage, question(preset=preset), []))
    for given in (1, 6, 7, 10, len(whole) - 1, len(whole)):
        rest = without_time(await ran(stage, question(preset=preset), [], whole[:given]))
        assert rest == whole[given:]


async def test_steps_that_were_never_taken_are_refused(stage: LanguageModelStage) -> None:
    published = (await ran(stage, question(), []))[:3]
    published[1].step.audio_id = stage.tokens.token_offset
    with pytest.raises(ParameterError, match="replayed step 1"):
        await ran(stage, question(), [], published)


async def test_turns_take_steps_in_turn_and_answer_as_alone(stage: LanguageModelStage) -> None:
    turns = [question(seed) for seed in (1, 2, 3)]
    alone = [without_time(await ran(stage, each, [])) for each in turns]
    order = []

    async def follow(number: int) -> list[Chunk]:
        chunks = []
        async for chunk in stage.run(turns[number], replayed([])):
            chunks.append(chunk)
            order.append(number)
        return chunks

    together = await asyncio.gather(*(follow(number) for number in range(3)))
    assert [without_time(chunks) for chunks in together] == alone
    shortest = min(map(len, alone))
    taken = [order[: 3 * shortest].count(number) for number in range(3)]
    assert max(taken) - min(taken) <= 1


# ---- the end of a turn ------------------------------------------------------------------------------------------


@pytest.fixture
def taken(stage: LanguageModelStage, monkeypatch) -> list[int]:
    """How many turns each step of the engine had."""
    sizes: list[int] = []
    real = stage.scheduler._engine.step

    def counted(answers):
        sizes.append(len(answers))
        return real(answers)

    monkeypatch.setattr(stage.scheduler._engine, "step", counted)
    return sizes


async def test_a_closed_turn_takes_no_further_step(stage: LanguageModelStage, taken: list[int]) -> None:
    chunks = stage.run(question(), replayed([]))
    for _ in range(3):
        await anext(chunks)
    await chunks.aclose()
    await stage.compute.turn().run(len, ())  # whatever was in the queue has run
    assert len(taken) <= 4


async def test_a_cancelled_turn_ends_with_the_step_that_is_being_computed(
    stage: LanguageModelStage, taken: list[int]
) -> None:
    asked = asyncio.create_task(ran(stage, question(), []))
    while len(taken) < 3:
        await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait([asked])
    assert asked.cancelled()
    begun = len(taken)
    await stage.compute.turn().run(len, ())
    assert len(taken) <= begun + 1


async def test_the_last_step_says_why_and_what_it_took(stage: LanguageModelStage, model) -> None:
    chunks = await ran(stage, question(max_new_tokens=7), [])
    ask = [{"role": "user", "message_type": "text", "content": "How are you?"}]
    expected, _ = plain(model, ask, max_new_tokens=7)
    assert [chunk.step.stop for chunk in chunks] == [STOP_REASON_UNSPECIFIED] * 6 + [STOP_REASON_MAX_NEW_TOKENS]
    report = chunks[-1].report
    assert (report.prompt_positions, report.units, report.dropped_messages) == (expected.prompt_positions, 7, 0)
    assert report.compute_seconds > 0


def scripted(stage: LanguageModelStage, ids: list[int], preset: str) -> list[Chunk]:
    """The chunks of a turn whose text track is given."""
    blank, last = stage.tokens.blank, len(ids) - 1
    asked = read_options(question(preset=preset), stage.tokenizer)
    answer = AnswerChunks(stage.tokenizer, stage.tokens, asked)
    return [
        answer.chunk(Step(i, token, blank, None, None, replayed=False, stop="max_new_tokens" if i == last else None))
        for i, token in enumerate(ids)
    ]


def test_an_unfinished_character_comes_out_with_the_last_step(stage: LanguageModelStage) -> None:
    half = next(i for i in range(256) if stage.tokenizer.token_bytes(i) == b"\xe4")
    chunks = scripted(stage, [*stage.tokenizer.encode("a"), half], "low-latency")
    assert [chunk.step.text for chunk in chunks] == ["a", "\ufffd"]


@pytest.mark.parametrize(("preset", "shown"), [("low-latency", ""), ("upstream", "<|im_kimia_text_blank|>")])
def test_what_belongs_to_the_transcript(stage: LanguageModelStage, preset: str, shown: str) -> None:
    """As the pipeline's text ids: a blank within it is, an audio code is not, nor anything from its end on."""
    [a], [b] = stage.tokenizer.encode("a"), stage.tokenizer.encode("b")
    ids = [a, stage.tokens.token_offset, stage.tokens.blank, stage.tokens.text_eos, stage.tokens.blank, b]
    chunks = scripted(stage, ids, preset)
    assert [chunk.step.in_transcript for chunk in chunks] == [True, False, True, False, False, False]
    assert [chunk.step.text for chunk in chunks] == ["a", "", shown, "", "", ""]


# ---- the context ------------------------------------------------------------------------------------------------


def exchange(tokens: int):
    return [text("§" * (tokens // 2)), text("Yes.", ROLE_ASSISTANT)]


async def test_the_oldest_turns_make_way(stage: LanguageModelStage) -> None:
    """The release's rule gives prompt and answer 1500 positions: the answer is that of the shorter conversation."""
    options = {"preset": "upstream", "max_new_tokens": 10, **SAMPLED}
    kept = [*exchange(500), *exchange(500), text("And now?")]
    chunks = await ran(stage, turn([*exchange(500), *exchange(500), *kept], "llm", 5, **options), [])
    alone = await ran(stage, turn(kept, "llm", 5, **options), [])
    assert [chunk.step for chunk in chunks] == [chunk.step for chunk in alone]
    assert [run[-1].report.dropped_messages for run in (chunks, alone)] == [4, 0]


async def test_a_last_turn_that_does_not_fit_is_refused(stage: LanguageModelStage) -> None:
    long = text("§" * 4096)
    with pytest.raises(ContextLengthError, match="message 2"):
        await ran(stage, turn([*exchange(3), long], "llm"), [])


# ---- the next turn of a conversation ----------------------------------------------------------------------------


@pytest.fixture
async def keeping(model):
    compute = ComputeThread()
    yield LanguageModelStage(model.lm, model.tokenizer, compute, 4, Prefixes(4 * context_bytes(model.lm)))
    compute.close()


async def rested(stage: LanguageModelStage) -> None:
    """Until everything that can be read ahead has been."""
    while not stage.scheduler._pump.done():
        await asyncio.sleep(0)


def counted() -> tuple[float, ...]:
    turns, positions = (metric.labels("hit")._value.get() for metric in (PREFIX_TURNS, PREFIX_POSITIONS))
    missed, read = (metric.labels("miss")._value.get() for metric in (PREFIX_TURNS, PREFIX_POSITIONS))
    return turns, missed, positions, read


async def conversation(stage: LanguageModelStage, stages, heard_codes: int | None = None, **options):
    """A turn with sound, its answer as the orchestrator remembers it, and the next turn; what its inbox has."""
    said = turn([text("§" * 25), heard(), text("Well?")], "llm", 3, **{**SAMPLED, "max_new_tokens": 90, **options})
    encoded = await ran(stages["tokenizer"], said, sound_log(QUESTION.read_bytes()))
    answer = answer_of(await ran(stage, said, encoded), heard_codes).message
    options = {**SAMPLED, **options, "max_new_tokens": 9, "say": None}
    again = turn([*said.messages, answer, text("And then?")], "llm", 4, **options)
    return said, answer, again, encoded


async def test_the_next_turn_finds_its_history_as_it_is_remembered(keeping, stage, stages) -> None:
    """Pieces of 64 positions: all that lie wholly within what the orchestrator tells of the turn before."""
    before = counted()
    _, _, again, encoded = await conversation(keeping, stages)
    await rested(keeping)
    there = without_time(await ran(keeping, again, encoded))
    assert there == without_time(await ran(stage, again, encoded))
    positions = there[-1].report.prompt_positions
    assert positions > 160
    hits, misses, reused, read = (now - then for now, then in zip(counted(), before, strict=True))
    assert (hits, misses) == (1, 1)  # the stage without a memory
    behind = 5  # turn end, start of the user's, "And then?", its end, start of the answer: at least
    assert reused == (positions - behind) // 64 * 64
    assert read == 2 * positions - reused


@pytest.mark.parametrize(
    "options", [{"output_type": "text"}, {"say": "Your order is on its way. " * 3}], ids=["text", "say"]
)
async def test_every_kind_of_answer_is_remembered(keeping, stage, stages, options) -> None:
    before = counted()
    _, answer, again, encoded = await conversation(keeping, stages, **options)
    assert answer.HasField("text") == ("output_type" in options)
    await rested(keeping)
    assert without_time(await ran(keeping, again, encoded)) == without_time(await ran(stage, again, encoded))
    assert counted()[0] - before[0] == 1


@pytest.mark.parametrize("heard_codes", [0, 70])
async def test_what_was_not_heard_is_no_part_of_the_history(keeping, stage, stages, heard_codes: int) -> None:
    """That is known only when the next turn comes: it finds what it has in common with what was made."""
    before = counted()
    _, _, again, encoded = await conversation(keeping, stages, heard_codes)
    await rested(keeping)
    there = without_time(await ran(keeping, again, encoded))
    assert there == without_time(await ran(stage, again, encoded))
    positions = there[-1].report.prompt_positions
    assert counted()[2] - before[2] in ((positions - 5) // 64 * 64, (positions - 5) // 64 * 64 - 64)


async def test_messages_that_were_dropped_shift_everything(keeping, stage) -> None:
    """A context that is full begins elsewhere with the next turn."""
    options = {"preset": "upstream", "max_new_tokens": 10, **SAMPLED}
    said = turn([*exchange(700), *exchange(500), text("And now?")], "llm", 5, **options)
    answer = answer_of(await ran(keeping, said, [])).message
    again = turn([*said.messages, answer, text("§" * 200)], "llm", 6, **options)
    await rested(keeping)
    there = without_time(await ran(keeping, again, []))
    assert there[-1].report.dropped_messages == 2
    assert there == without_time(await ran(stage, again, []))


async def test_a_turn_that_was_broken_off_leaves_what_it_has_read(keeping, stage, stages) -> None:
    said, _, again, encoded = await conversation(stage, stages)
    chunks = keeping.run(said, replayed(encoded))
    for _ in range(3):
        await anext(chunks)
    await chunks.aclose()
    before = counted()
    await rested(keeping)
    assert without_time(await ran(keeping, again, encoded)) == without_time(await ran(stage, again, encoded))
    assert counted()[0] - before[0] == 1


async def test_conversations_of_other_tenants_and_turns_without_one_share_nothing(keeping, stages) -> None:
    _, _, again, encoded = await conversation(keeping, stages)
    await rested(keeping)
    before = counted()
    again.caller.tenant = "other"
    await ran(keeping, again, encoded)
    again.session_id = ""
    await ran(keeping, again, encoded)
    assert counted()[:2] == (before[0], before[1] + 2)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "inbox", "error"),
    [
        (turn([], "llm"), [], ConversationError),
        (turn([text("a")], "llm", preset="fast"), [], ParameterError),
        (turn([], "llm", say="Hi", output_type="text"), [], ParameterError),
        (turn([], "llm", say="Hello there", max_new_tokens=2), [], ParameterError),
        (turn([heard()], "llm"), [Chunk(encoded=Encoded(codes=[1], clip_end=True), final=True)], KimiaError),
        (turn([heard()], "llm"), [], KimiaError),
    ],
    ids=["nothing", "preset", "say as text", "say too much", "no features", "no clip"],
)
async def test_wrong_turns_are_refused(stage: LanguageModelStage, asked, inbox, error: type[Exception]) -> None:
    with pytest.raises(error):
        await ran(stage, asked, inbox)


async def test_a_code_that_the_model_does_not_know(stage: LanguageModelStage, stages) -> None:
    log = await ran(stages["tokenizer"], turn([heard()]), sound_log(QUESTION.read_bytes()))
    log[0].encoded.codes[0] = 1 << 20
    with pytest.raises(ConversationError, match=r"message 0: .*code 1048576"):
        await ran(stage, turn([heard()], "llm"), log)


# ---- as a process loads it --------------------------------------------------------------------------------------


async def test_loaded_by_settings_and_warmed_up(stage: LanguageModelStage) -> None:
    loaded = LanguageModelStage.load(Settings(model=str(golden("e2e") / "model"), device="cpu", threads=1))
    await loaded.warm_up()
    here, there = await ran(stage, question(), []), await ran(loaded, question(), [])
    assert without_time(here) == without_time(there)
    loaded.compute.close()


async def test_a_quantised_stage_answers_as_the_quantised_model_and_goes_on_behind_any_step() -> None:
    folder = golden("e2e") / "model"
    stage = LanguageModelStage.load(Settings(model=str(folder), device="cpu", rows=3, quantize="int8"))
    chunks = without_time(await ran(stage, question(), []))
    twin = KimiAudio(folder, load_detokenizer=False, device="cpu", dtype=torch.float32, quantize="int8")
    ask = [{"role": "user", "message_type": "text", "content": "How are you?"}]
    sampling = {"text_temperature": 0.9, "audio_temperature": 0.9}
    done = list(twin.stream(ask, "both", seed=3, max_new_tokens=14, **sampling))[-1]
    assert tuple(chunk.step.text_id for chunk in chunks) == done.result.text_stream
    assert tuple(chunk.step.audio_id for chunk in chunks) == done.result.audio_stream
    for given in (1, 7, len(chunks) - 1):
        assert without_time(await ran(stage, question(), [], chunks[:given])) == chunks[given:]
    await stage.scheduler._pump  # what it still has to tidy
    stage.compute.close()
