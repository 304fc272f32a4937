"""`python -m services.llm`: the stage as a process, set up by its environment (`kimia.runtime.settings`)."""

from kimia.runtime.service import run_stage
from kimia.stage import LLM
from services.llm.stage import LanguageModelStage

if __name__ == "__main__":
    raise SystemExit(run_stage(LanguageModelStage.load, LLM))
