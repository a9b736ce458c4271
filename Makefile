# make demo · test · test-all · bench · bench-check · gpu · lint — everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Those of the extra "peers", each by itself: one that cannot be installed keeps no other away.
PEERS := $(shell sed -n '/^peers = \[/,/^]/s/.*"\(.*\)".*/\1/p' pyproject.toml)
# Each worker takes long runs of tests in their order, since neighbours share what they are judged by.
WORKERS ?= -n 2 --dist worksteal
# The C++ sources too: a change of theirs rebuilds the extension.
SOURCES := pyproject.toml setup.py setup_cuda.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-all bench bench-cpu bench-check lint format clean gpu

demo: $(VENV)/.installed
	$(BIN)/llama-fast generate "Once upon a time" --max-new-tokens 120 --seed 1
	@echo
	$(BIN)/llama-fast generate "从前" --max-new-tokens 120 --seed 1 --quiet
	@echo
	$(BIN)/llama-fast generate --max-new-tokens 5 --temperature 0 --quiet \
		"the answer to the ultimate question of life, the universe, and everything is "

# Half types on a third of the backends only. OP=attention: what belongs to that stem
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) $(if $(OP),-k $(OP)) $(ARGS)

# Every case in every dtype on every backend
test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest --all $(WORKERS) $(if $(OP),-k $(OP)) $(ARGS)

# ARGS="-k rms_norm --benchmark-json=out.json" and all else that pytest-benchmark takes
bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks -vv $(ARGS)

# ARGS="--rows 'decode bf16'" and the like: see python -m benchmarks.cpu --help
bench-cpu: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.cpu $(ARGS)

# Has a kernel slowed down since the results of this class of machine were recorded?
bench-check: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.check $(ARGS)

# On a machine with a GPU, without a network: the Python that is there, and nothing is installed.
# Build and tests; then ARGS=kernels and ARGS=models measure: see python3 -m benchmarks.gpu --help
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
	@echo "Setting up $(VENV): PyTorch is downloaded, and the C++ kernels are compiled: some minutes, once."
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(VENV)/bin/python
	@echo "Setting up $(VENV) with the test tools: some minutes, once."
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.installed

# The peers are compiled here; without them the benchmark runs, and says who is missing.
$(VENV)/.installed-peers: $(SOURCES) | $(VENV)/bin/python
	@echo "Setting up $(VENV) with the peers, which are compiled here: ten minutes or more, once."
	$(PIP) -e '.[bench]'
	for peer in $(PEERS); do \
		$(PIP) $$peer || echo "$$peer could not be installed; the benchmark runs without it."; \
	done
	touch $@ $(VENV)/.installed

# For make bench-cpu ARGS="--isa avx2" on a CPU that has more: llama.cpp held to it too.
build/llama-cpp-avx2: | $(VENV)/.installed-peers
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \
		$(PIP) install --no-deps --no-binary llama-cpp-python --target $@ llama-cpp-python

clean:
	rm -rf build dist $(VENV) llama_fast/*.so *.egg-info
