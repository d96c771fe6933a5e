# Needs Python >= 3.11, make and git; everything else goes into .venv.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.synced
UV := $(BIN)/uv
# uv is named in full, so that it works on this environment and no other. On a busy machine its own
# 60 s are not enough for bytecode.
UV_PIP := VIRTUAL_ENV=$(CURDIR)/$(VENV) UV_COMPILE_BYTECODE_TIMEOUT=600 $(UV) pip

.PHONY: help setup native native-if-possible native-sanitize demo test test-long test-soak lint format typecheck protos goldens locks wheel clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv from the lock and install the project editable

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: Python >= 3.11 is needed, this is {sys.version.split()[0]}; name another one: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

$(STAMP): $(UV) requirements/dev.txt pyproject.toml
	$(UV_PIP) sync --quiet --require-hashes --compile-bytecode requirements/dev.txt
	$(UV_PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

NATIVE := models/ops/native_kernels
NATIVE_STAMP := $(VENV)/.native

native: $(NATIVE_STAMP) ## Compile and install the native CPU kernels (C++17 compiler, or the ziglang wheel)

$(NATIVE_STAMP): $(STAMP) $(wildcard $(NATIVE)/src/* $(NATIVE)/*.py $(NATIVE)/*/*.py) $(NATIVE)/pyproject.toml
	$(UV_PIP) install --quiet --no-deps --no-build-isolation --reinstall ./$(NATIVE)
	@touch $@

# For what runs without them, too.
native-if-possible: $(STAMP)
	@if { command -v c++ || command -v g++ || command -v clang++; } >/dev/null || $(BIN)/python -c 'import ziglang' 2>/dev/null; \
	then $(MAKE) --no-print-directory native \
	|| echo "the native kernels did not compile: XLA multiplies, more slowly (docs/native.md)"; \
	else echo "no C++ compiler, so no native kernels: XLA multiplies, more slowly (docs/native.md)"; \
	fi >&2

native-sanitize: $(STAMP) ## The kernels' own test with ASan and UBSan
	$$($(BIN)/python $(NATIVE)/build_kernels.py --out build/native-sanitize --sanitize)

demo: native-if-possible ## Serve the default model, stream an answer over gRPC, print TTFT and TPOT
	$(BIN)/python tools/demo.py

# A file's tests stay together: many share a fixture that is dear to make.
# In the order of their names: the plugin's own order puts long files of few tests last.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder

test: lint typecheck ## Lint, types and the fast tests
	$(PYTEST)

test-long: $(STAMP) ## The tests that take minutes
	$(PYTEST) -m long --timeout 900

test-soak: $(STAMP) ## Long forms of tests that `make test` has
	$(PYTEST) -m soak --timeout 1800

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## mypy, strict
	$(BIN)/mypy

protos: $(STAMP) ## Regenerate the gRPC stubs from proto/
	$(BIN)/python tools/generate_protos.py

GOLDENS := build/goldens/bin
goldens: $(STAMP) ## Remake the golden outputs (torch and transformers in build/goldens)
	$(PYTHON) -m venv build/goldens
	$(GOLDENS)/pip install --quiet -r requirements/goldens.in
	model=$$($(BIN)/jaxserve pull); gemma=$$($(BIN)/jaxserve pull gemma-3-270m); \
	minilm=$$($(BIN)/jaxserve pull all-minilm-l6-v2); export PYTHONPATH=.; \
	$(GOLDENS)/python tools/make_tiny_goldens.py --out tests/goldens/tiny; \
	$(GOLDENS)/python tools/make_lora_goldens.py tests/goldens/tiny/biases tests/goldens/lora; \
	$(GOLDENS)/python tools/make_smollm2_goldens.py --model "$$model" --out tests/goldens/smollm2_greedy.json; \
	$(GOLDENS)/python tools/make_gemma3_goldens.py --model "$$gemma" --out tests/goldens/gemma3_greedy.json; \
	$(GOLDENS)/python tools/make_minilm_goldens.py --model "$$minilm" --out tests/goldens/minilm.json; \
	$(GOLDENS)/python tools/make_tokenizer_goldens.py gemma3 "$$gemma" tests/goldens/tokenizer; \
	$(GOLDENS)/python tools/make_tokenizer_goldens.py tokens "$$model" tests/goldens/tokenizer; \
	$(GOLDENS)/python tools/make_tokenizer_goldens.py chat "$$model" tests/goldens/tokenizer; \
	$(GOLDENS)/python tools/make_tokenizer_goldens.py sentencepiece "$$model" tests/goldens/tokenizer

COMPILE := $(UV_PIP) compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command 'make locks' $(LOCK_FLAGS)

locks: $(UV) ## Resolve the locks anew; LOCK_FLAGS=--upgrade takes newer versions
	$(COMPILE) requirements/uv.in -o requirements/uv.txt
	$(COMPILE) pyproject.toml -o requirements/runtime.txt
	$(COMPILE) pyproject.toml --extra bench --extra plot --extra data --extra tensorboard --extra study --extra index --extra otel --group test --group build -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra cuda12 -o requirements/cuda12.txt
	$(COMPILE) pyproject.toml --extra cuda13 -o requirements/cuda13.txt

wheel: $(STAMP) ## Build dist/jaxserve-*.whl
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) build --quiet --wheel --no-build-isolation --out-dir dist .

clean: ## Remove .venv, caches and built files
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
