# Commands for a checkout. They need Python 3.11 or newer with venv; the first call sets up .venv.

PYTHON ?= python3
# Not `?=`: some shells export HOST with the name of the machine. `make serve HOST=0.0.0.0 PORT=9000` still works.
HOST = 127.0.0.1
PORT = 8000
ENGINE ?= docker
IMAGE ?= robust
TORCH_INDEX ?=
ARGS ?=
# Parallel test processes.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Written last, so an interrupted setup starts again.
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help serve train test check audit lint types format docs image clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(READY) ## Serve models/robust_model.pt on http://127.0.0.1:8000 (HOST=, PORT=, ARGS=)
	@exec $(BIN)/robust serve --host $(HOST) --port $(PORT) $(ARGS)

train: $(READY) ## Train, for example ARGS="--data digits --recipe quick"
	@exec $(BIN)/robust train $(ARGS)

test: lint types ## Run lint, types and tests (ARGS= goes to pytest)
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

check: test ## Run all checks a commit must pass: test, and audit if the network allows
	@$(BIN)/python .ci/audit.py || [ $$? -eq 75 ]

audit: $(READY) ## Check the pinned packages for known vulnerabilities (needs the network)
	@$(BIN)/python .ci/audit.py

lint: $(READY) ## Run the linter and check the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Check the types
	$(BIN)/mypy

format: $(READY) ## Apply the linter's fixes and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## Build the site of docs/ and the reference in build/site (ARGS=)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

image: ## Build the container image (ENGINE=podman, TORCH_INDEX= for smaller wheels)
	$(ENGINE) build --build-arg TORCH_INDEX=$(TORCH_INDEX) --tag $(IMAGE) .

clean: ## Remove .venv, caches and builds; models and data stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools goes first, and then builds the project itself: the build needs nothing that is not pinned.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@echo "setting up $(VENV): minutes the first time, most of them for torch"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
