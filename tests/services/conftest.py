"""One loaded checkpoint for all tests of the stages: the plain pipeline, and stages over the very same weights."""

import pytest
import torch

from kimia.compute import ComputeThread
from kimia.pipeline import KimiAudio
from services.detokenizer.stage import DetokenizerStage
from services.llm.stage import LanguageModelStage
from services.tokenizer.stage import TokenizerStage
from tests.golden_data import golden


@pytest.fixture(scope="session")
def model() -> KimiAudio:
    return KimiAudio(golden("e2e") / "model", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def stages(model: KimiAudio):
    compute = [ComputeThread() for _ in range(4)]
    yield {
        "tokenizer": TokenizerStage(model.encoder, compute[0]),
        "llm": LanguageModelStage(model.lm, model.tokenizer, compute[1], rows=4),
        "detokenizer": DetokenizerStage(model.detokenizer, compute[2], compute[3]),
    }
    for thread in compute:
        thread.close()
