# make run: the dashboard on http://127.0.0.1:8050.   make test: lint, types, all tests.   The rest: make help.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint types unit browser late faults fuzz slow screenshots models bench peers peers-env image clean help

run: $(VENV)/.installed  ## start the dashboard and its worker
	$(PY) app.py

test: $(VENV)/.installed-dev chromium lint types unit  ## everything that has to hold before a change lands

lint: $(VENV)/.installed-dev  ## ruff
	$(VENV)/bin/ruff check .

types: $(VENV)/.installed-dev  ## mypy
	$(VENV)/bin/mypy

# Two at a time, a file each: most tests keep one core busy. Each process computes with one thread.
unit: $(VENV)/.installed-dev  ## pytest, the browser tests included
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

late: $(VENV)/.installed-dev  ## the browser tests with every answer to the page late, each by its own time: what passes only on an idle machine fails
	OMP_NUM_THREADS=1 LATE_ANSWERS_MS=700 $(PY) -m pytest tests/browser --numprocesses 2 --dist loadfile

faults: $(VENV)/.installed-dev  ## long fault-injection runs
	$(PY) -m pytest -m faults

fuzz: $(VENV)/.installed-dev  ## long fuzzing runs
	$(PY) -m pytest -m fuzz

slow: $(VENV)/.installed-dev  ## long measurements
	$(PY) -m pytest -m slow

screenshots: $(VENV)/.installed-dev chromium  ## every page, both themes, two widths, into test-results/
	$(PY) scripts/screenshots.py test-results/screenshots

bench: $(VENV)/.installed-dev $(PEERS)/.installed  ## measure and write docs/benchmarks.md; ONLY=gguf one part; bench/__main__.py names them
	$(PY) -m bench $(ONLY)

peers: $(VENV)/.installed-dev $(PEERS)/.installed  ## the same values as TransformerLens 4, or fail
	$(PY) -m bench.peers

peers-env: $(PEERS)/.installed  ## TransformerLens and nnsight, in an environment of their own

models: $(VENV)/.installed  ## train the demo models again (about half an hour on two cores)
	$(PY) scripts/train_demo_models.py

image:  ## build the container image, with docker or, where no daemon runs, with buildah
	@if docker info >/dev/null 2>&1; then docker build -t layerscope .; else buildah bud --format docker --isolation chroot -t layerscope .; fi

# llama-cpp-python compiles once (about five minutes); pip keeps the wheel.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"Layerscope needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Set PYTHON=python3.11.")'
	@command -v c++ >/dev/null || { echo "A C++ compiler is needed to build llama-cpp-python and none is installed (Debian: apt-get install g++)."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# torch first: what needs it then takes the build that is there.
$(PEERS)/.installed: bench/requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $$(grep '^torch==' bench/requirements-peers.txt)
	$(PEERS)/bin/python -m pip install --quiet --requirement bench/requirements-peers.txt
	touch $@

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  echo "Installing Chromium for the browser tests."; \
	  (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 \
	  || { echo "The browser tests need Chromium and it could not be installed; install the package chromium by hand."; exit 1; }; }

clean:  ## remove what was installed and built here (traces in data/ stay)
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache test-results

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
