# Two commands are the whole set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test e2e faults kills micro micro-smoke check proto format clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the `kimia` command in it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kimia needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

MICRO_MODEL := checkpoints/micro

demo: export OMP_NUM_THREADS = 1  # tiny matrices: threads would only wait for each other
demo: $(STAMP)  ## a phone call through the whole service, and where the time went
	@mkdir -p demo
	@echo; echo "The caller asks $(MICRO_MODEL)/examples/order.wav. What the model reads of it:"; echo
	@$(BIN)/kimia explain --model $(MICRO_MODEL) --audio $(MICRO_MODEL)/examples/order.wav > demo/prompt.txt
	@awk '/^$$/ { exit } { line[++rows] = $$0 } END { for (n = 1; n <= rows; n++) if (n < 7 || n > rows - 4) print line[n]; else if (n == 7) print "  ..." }' demo/prompt.txt
	@echo; echo "The service: an embedded Valkey, three stages, an orchestrator, each a process of its own."; echo
	@PATH="$(CURDIR)/$(BIN):$$PATH" kimia up --model $(MICRO_MODEL) --port 0 --run "sh $(MICRO_MODEL)/examples/call.sh demo"
	@echo; echo "To be heard: demo/answer.wav, demo/number.wav, demo/recall.wav   where the time went: demo/waterfall.svg"
	@echo "This is the micro model: it knows one shop's phone line and nothing else ($(MICRO_MODEL)/README.md)."
	@echo "With the real weights (26 GB: a GPU of 32 GB or more):"
	@echo "  .venv/bin/kimia up --model moonshotai/Kimi-Audio-7B-Instruct      and then      .venv/bin/kimia talk call.wav"

test: export OMP_NUM_THREADS = 1  # as many processes as cores, and tiny matrices
test: $(STAMP)  ## the tests, as continuous integration runs them
	@test -d .redis7 || bash tests/fetch_redis7.sh || echo "Redis 7.0.15 could not be fetched: what runs on Valkey only is said below"
	@test -d .triton || bash tests/fetch_triton.sh || echo "Triton could not be fetched: what needs it is skipped below"
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

e2e: $(STAMP)  ## the whole system in containers: needs a Docker engine, 2 GB of packages the first time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e tests/e2e

# A run is found again by its seed: make faults SEED=...
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
EXAMPLES ?= 2000

faults: $(STAMP)  ## random examples against the stream protocol, deliberate faults in it, schedules of faults: half an hour; SEED= finds a run again
	@echo "seed $(SEED), $(EXAMPLES) examples; the same again: make faults SEED=$(SEED) EXAMPLES=$(EXAMPLES)"
	KIMIA_FAULT_SEED=$(SEED) KIMIA_FAULT_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults tests/faults

KILLS ?= 100
CALLERS ?= 16
MODES ?=  # of the AOF: both

kills: $(STAMP)  ## processes of a service with real stages are killed under sixteen callers: twenty minutes; SEED= finds a run again
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign --seed $(SEED) --kills $(KILLS) --callers $(CALLERS) $(MODES)

micro-smoke: $(STAMP)  ## a few steps of every trainer, and the folder that they write
	OMP_NUM_THREADS=1 $(BIN)/python -m training.smoke

# Corpus, runs and the folder that comes of them lie in MICRO. Every command goes on where it was broken off.
MICRO ?= micro
SLICE ?=  # seconds: a machine that is lent for minutes
TRAINED := .venv/.trained

$(TRAINED): $(STAMP)
	@which flite espeak-ng text2wave > /dev/null || { echo "voices are missing: apt-get install flite espeak-ng festival festvox-kdlpc16k"; exit 1; }
	$(BIN)/pip install --constraint constraints.txt --editable '.[training]'
	@touch $@

micro: | $(TRAINED)  ## the micro checkpoint from nothing: speech, every trainer, the card's figures; hours on two cores. SLICE=480 trains for 8 minutes and goes on when called again
	OMP_NUM_THREADS=1 $(BIN)/python -m training.micro --folder $(MICRO) $(if $(SLICE),--seconds $(SLICE))

check: $(STAMP)  ## format, lint, types, import rules, dead code, the contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/released.binpb
	$(BIN)/python -m pytest -q tests/test_contract.py

# protoc looks for its plugins there
proto: export PATH := $(CURDIR)/$(BIN):$(PATH)
proto: $(STAMP)  ## generate kimia/v1 from proto/kimia/v1
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --mypy_out=quiet:. proto/kimia/v1/*.proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --grpc_python_out=. --mypy_grpc_out=quiet:. \
	    proto/kimia/v1/kimi_audio.proto proto/kimia/v1/stages.proto

format: $(STAMP)  ## rewrite the files in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove everything that was made here
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
