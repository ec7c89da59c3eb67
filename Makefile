# Everything happens inside .venv of this folder.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The house's rooms are top-level folders and one import package: give mypy that view of them.
TYPING := $(VENV)/typing

.PHONY: setup demo test check format bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/pip install -q "uv>=0.9"; }
	$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode --constraint constraints.txt -e ".[dev]"
	mkdir -p $(TYPING) && ln -sfn $(CURDIR) $(TYPING)/winnow
	touch $@

demo: setup
	$(BIN)/winnow demo --out demo

test: setup
	$(BIN)/pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=$(TYPING) $(BIN)/mypy -p winnow.operators -p winnow.stages -p winnow.pipeline

format: setup
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info demo bench/out
