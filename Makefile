PYTHON ?= python3
VENV ?= .venv
export TOKENIZERS_PARALLELISM = false
export TRANSFORMERS_VERBOSITY = error

.PHONY: demo test lint bench browser compat

demo: $(VENV)/installed
	$(VENV)/bin/python -m latentdiff.emoji64.demo

# A process for each core, up to four, of one thread each.
test: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The tests of the page drive a browser. Where there is none, root on Debian gets one; elsewhere these tests skip.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || ! command -v apt-get >/dev/null \
		|| test "$$(id -u)" -ne 0 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo "no chromium could be installed: the tests of the page will be skipped"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/everything.py

# Needs a package index: whether other releases of transformers and diffusers read the shipped folder.
compat: $(VENV)/installed
	$(VENV)/bin/python tests/compat.py

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
