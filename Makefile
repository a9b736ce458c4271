# make demo · test · bench · bench-check · gpu · lint — everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The C++ sources too: a change of theirs rebuilds the extension.
SOURCES := pyproject.toml setup.py setup_cuda.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test bench bench-cpu bench-check lint format clean gpu

demo: $(VENV)/.installed
	$(BIN)/llama-fast generate "Once upon a time" --max-new-tokens 120 --seed 1

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# ARGS="-k rms_norm --benchmark-json=out.json" and all else that pytest-benchmark takes
bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks $(ARGS)

# ARGS="--rows 'decode bf16'" and the like: see python -m benchmarks.cpu --help
bench-cpu: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.cpu $(ARGS)

# Has a kernel slowed down since the results of this class of machine were recorded?
bench-check: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.check $(ARGS)

# On a machine with a GPU, without a network: the Python that is there, and nothing is installed.
# ARGS="--parts attention,decode" and the like: see python3 -m benchmarks.gpu --help
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.installed

# The peers are compiled here; without them the benchmark runs, and says who is missing.
$(VENV)/.installed-peers: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]' \
		|| echo "Not all of the peers could be installed; the benchmark runs without them."
	touch $@ $(VENV)/.installed

clean:
	rm -rf build dist $(VENV) llama_fast/*.so *.egg-info
