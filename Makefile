# `make demo` and `make test` set up .venv/ by themselves; PYTHON names the interpreter to use.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test lint budgets sanitize sanitize-gpu bench bench-quick plots env clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cli,data,tensorboard,ode,bench,dist,dev]'
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

# The extension's tests on a second build, under AddressSanitizer and UndefinedBehaviorSanitizer.
# Python itself keeps memory to its end, so leaks are not looked for.
SANITIZED := build/sanitized
sanitize: setup
	FMREC_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib \
	  $(BIN)/pytest -q -o pythonpath= -k "cpp-cpu or extension or native or bindings" \
	  --extension-from=$(SANITIZED) tests

# On a CUDA device: the kernels' tests under NVIDIA's compute-sanitizer, every tensor with memory of
# its own, so that what is read or written beside it is found. CUDA graphs do not work that way.
GPU_KERNELS := -q -m gpu -k "triton-cuda or tiles or sweep or golden" tests
sanitize-gpu: setup
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  $(BIN)/python -m pytest $(GPU_KERNELS)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest $(GPU_KERNELS)

bench: setup
	$(BIN)/python -m benchmarks --save
	$(MAKE) plots

bench-quick: setup
	$(BIN)/python -m pytest benchmarks --quick

# The pictures in docs/ and the README's tables, from the committed records.
plots: setup
	$(BIN)/python -m benchmarks.plot --out docs
	$(BIN)/python -m benchmarks.table --readme README.md

env: setup
	$(BIN)/fmrec-fast env

clean:
	rm -rf .venv build dist runs *.egg-info fmrec_fast/*.so .pytest_cache .mypy_cache .ruff_cache
