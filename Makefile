# `make demo` and `make test` need Python 3.10+ and make, nothing else: they set up .venv themselves.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check docs gpu-check hosts peers peer-wheels clean setup

PYTHON ?= python3
OUT ?= runs/gpu-check
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
TYPED := $(wildcard jrl_kernels jrl setup.py tests benchmarks)
# make demo DEMO_ARGS=--fresh starts over; `jrl demo --help` lists the rest
DEMO_ARGS ?=
# What the benchmarks compare with, at the versions of constraints-bench.txt.
PEERS := cut-cross-entropy flash-maxsim inf-cl late-interaction-kernels liger-kernel open_clip_torch pylate \
  pytorch-metric-learning quack-kernels sentence-transformers apache-tvm-ffi torch-c-dlpack-ext
# What PyLate and sentence-transformers import beside; none of it asks for torch.
PEER_NEEDS := datasets scikit-learn einops
# The libraries that jrl_kernels/integrations serves, with what they import; none of it asks for torch or transformers.
HOSTS := late-interaction-kernels lightly open_clip_torch pylate pytorch-metric-learning sentence-transformers torchvision \
  cloudpickle datasets dill einops ftfy iopath joblib multiprocess narwhals pandas portalocker pyarrow pytz scikit-learn scipy \
  threadpoolctl timm wcwidth xxhash
# A folder of their own: transformers imports torchvision where it finds one, and PyPI's does not load beside a CPU's torch.
HOST_SITE := build/hosts/site-packages
# CuTe's compiler, 90 MB, for QuACK and liger_sm90: make peer-wheels CUTLASS=1
CUTLASS ?= $(if $(shell command -v nvidia-smi),1)
CUTLASS_DSL := nvidia-cutlass-dsl $(addprefix nvidia-cutlass-dsl-libs-,base core cu13)
# Of the GPU machine that the wheels go to.
WHEEL_PYTHON ?= 3.12
WHEEL_TAGS := $(foreach libc,2_34 2_31 2_28 2_27 2_24 2_17,--platform manylinux_$(libc)_x86_64) --platform manylinux2014_x86_64
# Where gpu-check unpacks them. QuACK takes for libraries what lies in a folder of this name; the second one is CuTe's own.
SITE := build/peers/site-packages
SITES := $(SITE):$(SITE)/nvidia_cutlass_dsl/dsl_packages
# make gpu-check BENCHMARK_ARGS="--op word_region_scores --against eager"; without, every op against everything.
# OUT keeps the cases that earlier runs of the same commit measured; --fresh drops those of another.
BENCHMARK_ARGS ?=
PYTEST_ARGS ?= -n logical --maxprocesses=8 --dist=loadgroup

demo: setup
	$(BIN)/python -m jrl.cli demo --out runs/demo $(DEMO_ARGS)

test: setup hosts
	$(BIN)/python -m pytest --ignore=tests/hosts $(PYTEST_ARGS)
	PYTHONPATH=$(HOST_SITE) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/hosts

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

# Every op and system has its page, every link leads somewhere, every Python block compiles.
docs: setup
	$(BIN)/python -m pytest -q tests/test_docs.py

# Without their dependencies, which would bring another torch. torchmultimodal's one wheel says Python 3.9 and runs on later ones.
hosts: $(HOST_SITE)/.installed

$(HOST_SITE)/.installed: constraints-hosts.txt constraints-bench.txt tests/hosts/sitecustomize.py | $(BIN)/python
	rm -rf $(HOST_SITE)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --target $(HOST_SITE) \
	  -c constraints-hosts.txt -c constraints-bench.txt $(HOSTS)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --target $(HOST_SITE) --upgrade \
	  -c constraints-hosts.txt --only-binary=:all: --python-version 3.9 torchmultimodal-nightly
	cp tests/hosts/sitecustomize.py $(HOST_SITE)
	touch $@

# The published implementations that the benchmarks compare with. Without their dependencies, which would bring another torch.
peers: setup
	$(PIP) -c constraints-bench.txt $(PEER_NEEDS) $(if $(CUTLASS),cuda-bindings protobuf)
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps -c constraints-bench.txt $(PEERS) $(if $(CUTLASS),$(CUTLASS_DSL))

# The same as files, for a GPU machine without a package registry: copy the folder along, and gpu-check finds it.
peer-wheels:
	mkdir -p wheels
	$(PYTHON) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: -d wheels \
	  --python-version $(WHEEL_PYTHON) --implementation cp $(WHEEL_TAGS) \
	  -c constraints-bench.txt $(PEERS) datasets dill multiprocess $(if $(CUTLASS),$(CUTLASS_DSL))
	du -sh wheels

# No network and no .venv: the interpreter given, built in place. A gpu test that skips is a failure here.
gpu-check:
	mkdir -p "$(OUT)"
	if [ -d wheels ]; then \
	  rm -rf $(SITE); \
	  $(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $(SITE) wheels/*.whl; \
	fi
	$(PYTHON) setup.py build_ext --inplace 2>&1 | tee "$(OUT)/build.log"
	PYTHONPATH=. $(PYTHON) -m jrl_kernels.info --json > "$(OUT)/info.json"
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu --forbid-skips --junitxml="$(OUT)/pytest.xml" 2>&1 | tee "$(OUT)/pytest.log"
	PYTHONPATH=.:$(SITES) $(PYTHON) -m benchmarks.run --out "$(OUT)" $(BENCHMARK_ARGS) 2>&1 | tee "$(OUT)/benchmarks.log"

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
