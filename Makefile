# `make demo` and `make test` set everything up by themselves.
VENV := .venv
PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
EXTRAS ?= dev
# The tests start many processes. Each compiles the package again unless the bytecode is kept.
export PYTHONDONTWRITEBYTECODE :=
# Bytecode is compiled at set-up: torch and diffusers take half a minute to import without it.
STAMP := $(VENV)/.set-up-$(EXTRAS)

.DEFAULT_GOAL := help
.PHONY: help setup lock demo app test slow check style clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv and install the pinned packages

# Everything that is installed has a hash in constraints.txt, uv itself and what builds packages too.
$(STAMP): pyproject.toml constraints.txt | $(UV)
	$(UV) pip install --quiet --python $(PYTHON) --constraint constraints.txt --build-constraint constraints.txt --compile-bytecode --editable '.[$(EXTRAS)]'
	touch $@

$(UV):
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip > /dev/null
	awk '/^[^ ]/ { ours = /^uv==/ } ours' constraints.txt | \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement /dev/stdin

lock: $(UV) ## pin all packages, with hashes, after a change of pyproject.toml; the pins that still fit stay
	$(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-annotate --no-header --no-emit-index-url --output-file constraints.txt pyproject.toml

demo: $(STAMP) ## clips -> pairs -> the small model, fine-tuned -> images before and after, in a few minutes
	$(PYTHON) scripts/demo.py --output demo

app: $(STAMP) ## the editing page, with the small model: http://127.0.0.1:7860
	$(PYTHON) scripts/app.py

test: $(STAMP) ## the tests
	$(PYTHON) -m pytest -m "not slow" --numprocesses auto --dist worksteal

slow: $(STAMP) ## the tests that take longer
	$(PYTHON) -m pytest -m "slow or property" --hypothesis-profile long --numprocesses auto --dist loadscope

check: $(STAMP) ## lint, formatting, import contracts, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

style: $(STAMP) ## mend lint and formatting where a tool can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove what the commands above made
	rm -rf $(VENV) demo build *.egg-info
