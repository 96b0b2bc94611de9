# Each target does all of its own set-up: a fresh clone needs nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: help setup demo demo-full claims test test-slow test-cluster check bench clean

help:
	@echo "make demo   the whole line on made-up data, ends with the path of report.html"
	@echo "make demo-full  the same with a larger world and a longer training: about half an hour"
	@echo "make claims  what the method claims, measured on the larger world: about three quarters of an hour"
	@echo "make test   the test suite"
	@echo "make test-cluster  launches over several hosts (network namespaces, as root) and a small Slurm"
	@echo "make test-slow  long tests: the demo killed at many moments, and the like"
	@echo "make check  what CI runs: format, lint, types, layers, tests"
	@echo "make bench  the benchmarks (ratios against a baseline in the same run)"

setup: $(STAMP)

# torch first and alone: the other packages then take the build that is there (CPU or CUDA)
$(STAMP): pyproject.toml constraints/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints/tested.txt torch
	$(PIP) --constraint constraints/tested.txt --editable ".[dev,mpi]"
	touch $@

demo: $(STAMP)
	$(BIN)/nd demo

demo-full: $(STAMP)
	$(BIN)/nd demo --full

claims: $(STAMP)
	$(BIN)/python -m pytest tests/claims -m claims

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not cluster and not claims'

test-cluster: $(STAMP)
	$(BIN)/python -m pytest tests/cluster -m 'cluster and not slow'

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
