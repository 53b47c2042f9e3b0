# Every target first brings the set-up up to date: a virtual environment with pinned dependencies,
# and for those that need it the demo model.  Stamp files in .venv remember what is done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
DIFFERENTIAL := $(VENV)/differential
TRL := $(VENV)/bench-trl
PACKAGES := api core migrations ppo_engine trimtab worker

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit chaos check fix bench bench-trl differential up clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make the virtual environment

demo: $(INSTALLED) $(MODEL) ## The main job end to end: upload, PPO, live progress, adapter, before and after
	$(BIN)/trimtab demo

up: $(INSTALLED) $(MODEL) ## Start the service in the foreground
	$(BIN)/trimtab up

test: $(INSTALLED) $(MODEL) ## Run the whole test suite
	$(BIN)/python -m pytest

test-unit: $(INSTALLED) ## Run the fast tests alone
	$(BIN)/python -m pytest tests/unit

chaos: $(INSTALLED) ## Kill everything under running jobs, over SEEDS seeds (default 5), and report what was lost
	$(BIN)/python -m tests.chaos --seeds $(or $(SEEDS),5)

check: $(INSTALLED) ## Check format, lint, types and the direction of imports; change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED) ## Format, and repair what is safe to repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) $(MODEL) ## Time the training step, its growth and the service
	$(BIN)/python -m benchmarks.step --model "$$($(BIN)/trimtab models fetch smollm2-135m-instruct)"
	$(BIN)/python -m benchmarks.scaling --model "$$($(BIN)/trimtab models fetch smollm2-135m-instruct)"
	$(BIN)/python benchmarks/service.py

bench-trl: $(INSTALLED) $(MODEL) $(TRL)/.installed ## Time the training step beside that of TRL
	$(BIN)/python -m benchmarks.trl_step --model "$$($(BIN)/trimtab models fetch smollm2-135m-instruct)" $(ARGUMENTS)

differential: $(DIFFERENTIAL)/.installed ## Ask public PPO implementations for the numbers that tests compare ours with
	TRL_EXPERIMENTAL_SILENCE=1 $(DIFFERENTIAL)/bin/python tests/differential/generate.py

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard ppo_engine/native*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

$(MODEL): $(INSTALLED)
	$(BIN)/trimtab models fetch smollm2-135m-instruct
	@touch $@

$(TRL)/.installed: benchmarks/trl-requirements.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(DIFFERENTIAL)/.installed: tests/differential/requirements.txt tests/differential/requirements-without-dependencies.txt
	$(PYTHON) -m venv $(DIFFERENTIAL)
	$(DIFFERENTIAL)/bin/pip install --quiet --disable-pip-version-check -r $<
	$(DIFFERENTIAL)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $(word 2,$^)
	@touch $@
