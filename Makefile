# Everything here sets itself up: `make demo` and `make test` work in a fresh clone.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt

.PHONY: demo test test-slow lint docs bench pictures clean

# one thread: on a model this small a second one saves a fifth, and waits for ever where the core is busy
demo: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/sixfold demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W -q -b html docs docs/_build

bench: $(VENV)/.test
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/ops.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py

pictures: $(VENV)/.run
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/page.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[cli]'
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install -q -e '.[cli,test]'
	# without its dependencies: torchvision would have to fit this very build of torch
	$(BIN)/python -m pip install -q --no-deps 'timm>=1.0.20'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install -q -e '.[cli,test,dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/python -m pip install -q -e '.[cli,docs]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
