"""`python -m services.detokenizer`: the stage as a process, set up by its environment (`kimia.runtime.settings`)."""

from kimia.runtime.service import run_stage
from kimia.stage import DETOKENIZER
from services.detokenizer.stage import DetokenizerStage

if __name__ == "__main__":
    raise SystemExit(run_stage(DetokenizerStage.load, DETOKENIZER))
