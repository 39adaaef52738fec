# Everything a clone needs. `make demo` and `make test` work as the first command: they make .venv themselves.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   TORCH=torch==X.Y    another torch than the pinned one
PYTHON ?= python3
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install test test-slow demo bench lint format clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' Makefile | expand -t 20

install: $(VENV)/installed  ## .venv with lit-did and all it needs, the extension built

# The stamp remembers TORCH: another one is another install.
$(VENV)/torch-$(subst /,-,$(or $(TORCH),pinned)):
	@echo "Making $(VENV): a minute or two for torch and the others, another to build the extension."
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -qq --constraint constraints.txt setuptools wheel pybind11 ninja
	$(PIP) install -qq $(if $(TORCH),"$(TORCH)",--constraint constraints.txt torch)
	touch $@

$(VENV)/installed: $(VENV)/torch-$(subst /,-,$(or $(TORCH),pinned)) $(SOURCES)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -qq --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev]'
	$(BIN)/python -m lit_did.doctor | grep -E '^(extension|CPU|CUDA) '
	touch $@

test: install  ## the tests, doctests included
	$(BIN)/python -m pytest

test-slow: install  ## the tests that take minutes or many gigabytes
	$(BIN)/python -m pytest -m slow

demo: install  ## trains a 135M-parameter model with DPO and shows its DID: ARGS="--max-steps 5"
	$(BIN)/python -m lit_did.demo $(ARGS)

bench: install  ## times the operators against plain torch
	$(BIN)/python -m benchmarks $(ARGS)

lint: install  ## ruff, clang-format, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell

format: install  ## rewrites the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## removes what was built and written
	rm -rf $(VENV) build dist *.egg-info lit_did/_C*.so lit_did/_build.json demo_output bench_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
