# Each target works alone on a fresh machine that has Python 3.11 or newer and make.
# PYTHON=python3.12 make setup    picks another interpreter
# make soak MINUTES=30 SEED=7       repeats what an earlier soak chose to do
# make test ARGS="-k restore"     passes arguments on to pytest (test), or to the program (bench)

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup setup-servers demo test check bench soak

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install Outlast with everything its developers need

# The stamp is older than pyproject.toml when requirements may have changed; otherwise this is instant.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Outlast needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; run: make setup PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || { echo "$(PYTHON) can't make virtual environments; on Debian run: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --help | grep -e '--group' >/dev/null || $(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@echo "installing into .venv (this takes a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group dev
	@touch $@

setup-servers: ## install the servers and rival programs that some tests and the benchmark use (Debian)
	@.ci/setup-servers

demo: setup ## back up, change, lose, restore and damage a real model folder; under two minutes
	@HF_HUB_OFFLINE=1 $(BIN)/python demo/demo.py

test: setup ## run every test, on all cores
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

MINUTES ?= 5
soak: setup ## random work by several processes with kills and faults for MINUTES=n, repeated by SEED=n
	@$(BIN)/python tests/soak/run.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

check: setup ## style, types, import rules and house rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/test_tidy.py

bench: setup ## measure against restic, borg and the disk, and write docs/benchmarks.md (needs 20 GB, half an hour)
	@$(BIN)/python bench/run.py $(ARGS)
