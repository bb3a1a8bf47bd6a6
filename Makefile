# `make demo` from a fresh clone: the environment, the demo pipeline, its table. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --timeout 120 --retries 10
# CPU=1: without what only a GPU needs and `import torch` does not.
GPU_ONLY := $(if $(CPU),triton|cuda-bindings|nvidia-cusolver,none)

# Stage commands of the pipeline find `isd-repro` there.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: help venv demo pull test test-slow test-gpu rehearse lint check format lock sync clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## the environment of requirements.lock, in .venv; CPU=1 leaves out 1.3 GB that only a GPU needs

$(STAMP): requirements.lock pyproject.toml
	@echo "Installing the locked environment into $(VENV) (about $(if $(CPU),5,6) GB, some minutes; once)"
	@$(PYTHON) -m venv $(VENV)
	@awk '/^[a-z]/ {keep = !/^($(GPU_ONLY))==/} keep' requirements.lock > $(VENV)/requirements.lock
	@$(PIP) install --no-deps --require-hashes -r $(VENV)/requirements.lock | { collected=0; while read -r word rest; do \
	  case "$$word $$rest" in \
	    Collecting*) collected=$$((collected + 1)); [ $$((collected % 25)) -ne 0 ] || echo "  $$collected packages" ;; \
	    Downloading*" ("[0-9][0-9][0-9]*" MB)") echo "  downloading $$rest" ;; \
	    Installing*) echo "  unpacking $$collected packages" ;; \
	  esac; done; }
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Two DVCs at a time go through half of the runs each, dealt in the order 0 1 1 0 0 1 1 0, so that both take equally long; each waits
# where the other one is reading or writing. DVC reads the stages of all profiles when it starts, which takes longer than many a stage,
# so the other profiles are hidden from it meanwhile. DVC's remarks go to the log.
demo: venv ## reproduce the demo on a CPU, two runs at a time, and print its table
	@[ -e .git ] || $(BIN)/dvc config --local core.no_scm true  # unpacked from an archive, without a repository
	@mkdir -p .state
	@echo "Running what has changed; .state/demo.log has all of its output"
	@trap 'rm -f pipelines/.dvcignore' EXIT; [ ! -d pipelines ] || echo '*' > pipelines/.dvcignore; \
	{ $(BIN)/dvc repro -s dvc.yaml:prepare \
	  && $(BIN)/dvc stage list --name-only dvc.yaml | grep '@' | grep -v '^prepare@' | sort -s -t@ -k2,2 \
	     | awk -F@ '$$2 != run {run = $$2; half = int(++runs / 2) % 2} {of[half] = of[half] " dvc.yaml:" $$0} END {print of[0]; print of[1]}' \
	     | xargs -P 2 -L 1 $(BIN)/dvc --wait-for-lock repro -s \
	  && $(BIN)/dvc repro; } 2>&1 | tee .state/demo.log | { grep --line-buffered -E "^Running stage|warning:|error:" || true; } \
	  || { tail -n 20 .state/demo.log; exit 1; }
	@$(BIN)/isd-repro show
	@[ ! -e .git ] || { $(BIN)/isd-repro compare || true; } 2>/dev/null | tail -n 1 \
	  | sed 's/^/Against the last commit: /' | fold -s -w 80
	@[ ! -e .git ] || echo "Back to the committed results: git restore reports/demo dvc.lock"

pull: venv ## fetch the encoders of committed results from the DVC remote; PROFILE=pipelines/NAME for one profile
	@for lock in $(if $(PROFILE),$(PROFILE)/dvc.lock,$(wildcard dvc.lock pipelines/*/dvc.lock)); do \
	  sed -n "s|^ *- path: \(runs/.*/encoder.safetensors\)$$|$$(dirname "$$lock")/\1|p" "$$lock"; \
	done | sort -u | xargs $(BIN)/dvc pull --allow-missing

test: venv ## the normal tests
	@$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: venv ## the tests marked slow
	@$(BIN)/python -m pytest -q -m "slow and not gpu"

test-gpu: venv ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

rehearse: venv ## the GPU day's script at toy size, on a CPU
	@folder=$$(mktemp -d) && $(BIN)/python -m benchmarks.gpu_day --toy --out "$$folder" && rm -r "$$folder"

lint: venv ## format, lint, types and the import contract
	@$(BIN)/ruff format --check --quiet || { echo "make format fixes this"; exit 1; }
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

check: lint test ## everything before a commit

format: venv ## format the code and fix what ruff can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

lock: ## write requirements.lock from pyproject.toml (needs uv)
	@uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header -o requirements.lock

sync: ## copy dvc.yaml to every profile
	@for folder in pipelines/*/; do cp dvc.yaml "$$folder"; done

clean: ## remove caches; environment, results and resume state stay
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
	@find isd_repro tests -name __pycache__ -type d -prune -exec rm -rf {} +
