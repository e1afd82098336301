# Every target does its own set-up: uv if it is missing, the Python packages, pigz where possible.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs format setup sync

VENV := $(or $(UV_PROJECT_ENVIRONMENT),.venv)
PYTHON := $(VENV)/bin/python
ARGS ?=
KEEP ?=
# pytest's status when ARGS leave nothing of a stage; without ARGS that is a failure
NOTHING_CHOSEN := [[ $$? -eq 5 && -n '$(ARGS)' ]]

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 16
	@echo '  ARGS="…" is passed on: make test ARGS="-k journal", make bench ARGS="--quick"'

demo: ## run a broker, a worker and one real inference task (KEEP=1: leave broker and worker running)
	@scripts/bootstrap.sh demo
	@$(PYTHON) -m worker.commands.command_line demo $(if $(filter-out 0 no false,$(KEEP)),--keep) $(ARGS)

# Most tests wait for other processes. A file's tests share what is slow to make, so they stay together; each process of
# the tests, and what it starts, computes in one thread, so that they leave room for each other.
test: setup ## run all tests, against a real broker and the real daemon; those with vLLM last
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile -m 'not vllm' $(ARGS) || $(NOTHING_CHOSEN)
	@$(PYTHON) -m pytest -m vllm $(ARGS) || $(NOTHING_CHOSEN)

check: setup ## run what CI runs beside the tests: lint, format, types, generated pages, lock file
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(PYTHON) -m worker.commands.docs_pages --check
	scripts/uv.sh lock --check

bench: setup ## measure start, memory, latency and throughput
	@$(PYTHON) benchmarks/run_all.py $(ARGS)

docs: setup ## rewrite the generated pages in docs/
	@$(PYTHON) -m worker.commands.docs_pages

format: setup ## rewrite the code in the project's format
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

setup: ## install everything that the targets need
	@scripts/bootstrap.sh dev

sync: setup
