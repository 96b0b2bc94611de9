# Each target does all of its own set-up: a fresh clone needs nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: help setup demo demo-full claims test test-launch test-cluster test-slow check bench docs clean

help:
	@echo "make demo   the whole pipeline on simulated data; prints the path of report.html"
	@echo "make demo-full  the same with a larger world and a longer training: about half an hour"
	@echo "make claims  what the method claims, measured on the larger world: about three quarters of an hour"
	@echo "make test   the test suite: about eight minutes on two cores"
	@echo "make test-launch  tests that start ranks: trainings and evaluations of several ranks, killed ranks, the whole pipeline"
	@echo "make test-cluster  launches over several hosts (network namespaces, as root) and a small Slurm"
	@echo "make test-slow  long tests: the demo killed at many moments, and the like"
	@echo "make check  format, lint, types, layers, make test and make test-launch"
	@echo "make docs   the documentation as a site, in build/site; fails on a broken link"
	@echo "make bench  the benchmarks (ratios against a baseline in the same run)"

setup: $(STAMP)

# torch first and alone: the other packages then take the build that is there (CPU or CUDA)
$(STAMP): pyproject.toml constraints/tested.txt constraints/beside-torch.txt
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

# two processes; a file's tests stay in one of them, where they share what they build
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-launch: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'launch and not slow'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not cluster and not claims'

test-cluster: $(STAMP)
	$(BIN)/python -m pytest tests/cluster -m 'cluster and not slow'

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test test-launch

bench: $(STAMP)
	$(BIN)/python -m benchmarks

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
