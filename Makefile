# `make demo` and `make test` need Python 3.10+ and make, nothing else: they set up .venv themselves.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check docs gpu-check clean setup

PYTHON ?= python3
OUT ?= runs/gpu-check
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
TYPED := $(wildcard jrl_kernels jrl setup.py tests benchmarks)
# make demo DEMO_ARGS=--fresh starts over; `jrl demo --help` lists the rest
DEMO_ARGS ?=
# make gpu-check BENCHMARK_ARGS="--op word_region_scores --against eager"; without, every op against everything
BENCHMARK_ARGS ?=
PYTEST_ARGS ?= -n logical --maxprocesses=8 --dist=loadgroup

demo: setup
	$(BIN)/python -m jrl.cli demo --out runs/demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

# Every op and system has its page, every link leads somewhere, every Python block compiles.
docs: setup
	$(BIN)/python -m pytest -q tests/test_docs.py

# No network and no .venv: the interpreter given, built in place. A gpu test that skips is a failure here.
gpu-check:
	mkdir -p "$(OUT)"
	$(PYTHON) setup.py build_ext --inplace 2>&1 | tee "$(OUT)/build.log"
	PYTHONPATH=. $(PYTHON) -m jrl_kernels.info --json > "$(OUT)/info.json"
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu --forbid-skips --junitxml="$(OUT)/pytest.xml" 2>&1 | tee "$(OUT)/pytest.log"
	PYTHONPATH=. $(PYTHON) -m benchmarks.run --out "$(OUT)" $(BENCHMARK_ARGS) 2>&1 | tee "$(OUT)/benchmarks.log"

setup: $(VENV)/.extension-built

$(VENV)/.extension-built: $(VENV)/.installed setup.py $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# torch first and alone: this exact requirement takes whatever build of it the machine offers, before others ask for one.
$(VENV)/.installed: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) setuptools wheel pybind11 ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "jrl needs Python 3.10 or newer, and $(PYTHON) is not; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) lacks venv or ensurepip (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info jrl_kernels/_C.* jrl_kernels/_build_info.json $(VENV)/.extension-built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
