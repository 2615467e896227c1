PYTHON ?= python3
VENV ?= .venv
export TOKENIZERS_PARALLELISM = false
export TRANSFORMERS_VERBOSITY = error

.PHONY: demo test lint bench

demo: $(VENV)/installed
	$(VENV)/bin/python -m latentdiff.demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/training_step.py

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
