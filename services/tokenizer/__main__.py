"""`python -m services.tokenizer`: the stage as a process, set up by its environment (`kimia.runtime.settings`)."""

from kimia.runtime.service import run_stage
from kimia.stage import TOKENIZER
from services.tokenizer.stage import TokenizerStage

if __name__ == "__main__":
    raise SystemExit(run_stage(TokenizerStage.load, TOKENIZER))
