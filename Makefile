# Every target works as the first command in a fresh clone that has Python 3.11, gcc, git and make.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
export SIGNALBOX_HOME ?= $(CURDIR)/.signalbox
export DAGSTER_HOME := $(SIGNALBOX_HOME)/dagster
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo serve check test lint bench soak lock install real clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   two workflows with days of history, on generated data"
	@echo "make serve  the pages: Dagster, MLflow, Evidently, reports"
	@echo "make check  lint, types and the quick tests, in about a minute and a half: before each commit"
	@echo "make test   lint, types and every test    make bench  the measurements of docs/benchmarks.md"
	@echo "make soak   hundreds of kills in the middle of pushes and rollbacks, and what stood afterwards; then every"
	@echo "            property test at random, TIMES=25 as many examples, for at most MINUTES=60"
	@echo "make real   both workflows on the real data sets below DATA=../shared/data"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name one with make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(VENV) (about two minutes, 2 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	@$(BIN)/signalbox demo

serve: install
	@$(BIN)/signalbox serve

real: install
	@$(BIN)/signalbox real --data "$(or $(DATA),../shared/data)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is not slow is said in tests/conftest.py. One import of the libraries a worker, so a file stays with one worker.
check: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# The crash test runs by itself: it prints what was killed when, and its kills should land where a quiet machine puts them.
test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/system/test_crash.py
	$(BIN)/pytest tests/system/test_crash.py

bench: install
	$(BIN)/python -m benchmarks

soak: install
	$(BIN)/python -m tests.support.crashing --kills $(or $(KILLS),300)
	SIGNALBOX_SOAK=$(or $(TIMES),25) SIGNALBOX_SOAK_MINUTES=$(or $(MINUTES),60) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder \
		$$(grep -rl "from hypothesis" tests --include="test_*.py")

lock: install
	$(BIN)/uv pip compile pyproject.toml --extra sandbox --group dev --universal --python-version 3.11 --generate-hashes --no-strip-extras --no-header --upgrade -q -o requirements.lock

clean:
	rm -rf "$(SIGNALBOX_HOME)"
