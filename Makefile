# make demo, make test, make test-sanitized, make test-oldest, make test-newest, make families, make lint: each first sets up
# what it needs in .venv, and only what changed. make constraints raises the versions that all but test-newest install.
#
# TORCH is given to pip as it stands, so a machine without a GPU can name an index of CPU builds:
#   make test TORCH="torch -i ADDRESS_OF_THE_INDEX"

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys, ensurepip; print("$(p)") if sys.version_info >= (3, 11) else None' 2>/dev/null)))
TORCH ?= torch==2.13.0
MODEL ?=

# Threads that wait do not spin: on a machine that computes something else too, spinning costs tenfold.
export OMP_WAIT_POLICY ?= passive

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Also for what builds the package: pip before 25.3 reads the first of these there, later ones the second.
CONSTRAINED := PIP_CONSTRAINT="$(CURDIR)/constraints.txt" PIP_BUILD_CONSTRAINT="$(CURDIR)/constraints.txt"
SANITIZED := $(VENV)/sanitized
OLDEST := .venv-oldest
NEWEST := .venv-newest
# What meets transformers, safetensors, gguf, peft and the hub.
MEETING := tests/integrations tests/inference tests/runtime tests/models tests/pipeline/test_run.py \
	tests/foreign/test_exporting.py tests/foreign/test_importing.py tests/evaluate
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\(.*\)".*/\1/p' pyproject.toml)
SOURCES := $(shell find src native -type f ! -name '*.so' ! -name '*.pyc') pyproject.toml constraints.txt README.md LICENSE

.PHONY: demo test test-sanitized test-oldest test-newest constraints families newest lint clean

demo: $(VENV)/installed
	@$(BIN)/python scripts/demo.py $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/installed
	@OMP_NUM_THREADS=1 $(BIN)/pytest

# Compiled code under gcc's address and undefined-behaviour sanitizers: its own build, and tests of every path. A fault
# ends the process with a report, so pytest must not capture it. Python itself leaks, and is not asked about that.
test-sanitized: $(SANITIZED)/installed
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 PYTHONPATH=$(SANITIZED) \
		$(BIN)/pytest -x --capture=no -p no:cacheprovider tests/kernels tests/linalg/test_columns.py tests/linalg/test_hadamard.py \
		tests/runtime/test_decoder.py \
		-k "(test_matmul and not double_precision and not threads) or shape3 or test_columns or values_and_gradients or every_path or rotated or boundary"

# What meets transformers, with the oldest one that pyproject.toml allows.
test-oldest: $(OLDEST)/installed
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest $(MEETING)

# The same, the hub and checkpoints with the newest of everything but torch, which stays the one that TORCH names.
test-newest: newest
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest $(MEETING) tests/foreign tests/checkpoint

# With the oldest Python that pyproject.toml allows, so that the versions exist for all: make constraints PYTHON=python3.11
constraints: newest
	@$(NEWEST)/bin/python scripts/constraints.py $(NEWEST)/bin/python

# docs/families.md: every causal language model that transformers knows, tiny and random, through the whole way.
families: $(VENV)/installed
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/families.py

lint: $(VENV)/installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist demo .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch $(OLDEST)/torch $(NEWEST)/torch:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv here; install one, or name it: make PYTHON=..."; exit 1; }
	@echo "Setting up $(@D): $(TORCH)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install $(TORCH)
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "Setting up $(VENV): elastiq"
	@$(CONSTRAINED) $(PIP) install '.[all,dev]'
	@touch $@

# A failing build would leave a package without compiled code.
$(SANITIZED)/installed: $(VENV)/installed
	@echo "Setting up $(SANITIZED): elastiq"
	@$(CONSTRAINED) $(PIP) install . --no-deps --upgrade --target $(SANITIZED) \
		--config-settings build-dir=build/sanitized --config-settings cmake.build-type=Sanitize \
		--config-settings "cmake.define.CMAKE_CXX_FLAGS_SANITIZE=-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
	@ls $(SANITIZED)/elastiq/linalg/_native*.so >/dev/null
	@touch $@

$(OLDEST)/installed: $(OLDEST)/torch $(SOURCES)
	@echo "Setting up $(OLDEST): elastiq, transformers $(OLDEST_TRANSFORMERS)"
	@grep -Ev '^(transformers|tokenizers|huggingface-hub)==' constraints.txt >$(OLDEST)/constraints.txt
	@$(subst /constraints.txt,/$(OLDEST)/constraints.txt,$(CONSTRAINED)) $(OLDEST)/bin/python -m pip \
		--disable-pip-version-check -qq install '.[all,dev]' transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

# Each time, because others release when they like.
newest: $(NEWEST)/torch
	@echo "Setting up $(NEWEST): elastiq, the newest of everything"
	@$(NEWEST)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$(NEWEST)/torch
	@PIP_CONSTRAINT=$(NEWEST)/torch $(NEWEST)/bin/python -m pip --disable-pip-version-check -qq install \
		--upgrade --upgrade-strategy eager '.[all,dev]'
