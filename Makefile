# `make demo` and `make test` set up .venv/ by themselves; PYTHON names the interpreter to use.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test lint budgets bench bench-quick env clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cli,tensorboard,ode,bench,dev]'
	touch $@

demo: setup
	$(BIN)/fmrec-fast demo --out runs/demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

budgets: setup
	$(BIN)/python -m fmrec_fast.kernels.budget

bench: setup
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.plot --out docs

bench-quick: setup
	$(BIN)/python -m pytest benchmarks --quick

env: setup
	$(BIN)/fmrec-fast env

clean:
	rm -rf .venv build dist runs *.egg-info fmrec_fast/*.so .pytest_cache .mypy_cache .ruff_cache
