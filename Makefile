# Every target sets itself up: a bare machine needs git, make and Python >= 3.11 with pip, nothing else.
# Override on the command line, e.g. `make test ARGS="-k cli -x"`, `make demo ARGS=--quick`, `make test PYTHON=python3.12`.

VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.diverse-cfg-installed

# The newest tested interpreter that can make a virtual environment (Debian packs `ensurepip` separately).
USABLE = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	if $$p $(USABLE) >/dev/null 2>&1; then echo $$p; break; fi; done)

OFFLINE = HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-lowest lint format hooks house build docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with the exact versions of constraints.txt (every other target does this by itself)

# torch comes first and by plain pip: a CPU wheel where pip's configuration offers one, the default build elsewhere.
# audiocraft comes last and without its dependencies, whose pins cannot be installed any more; the tests compare with it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv and pip was found; install one (Debian and Ubuntu: \
	apt-get install python3 python3-venv; macOS: brew install python@3.12) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) $(USABLE) || { echo "error: PYTHON=$(PYTHON) is older than 3.11 or lacks venv and ensurepip" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt hatchling editables setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev,recipes,audiocraft,listen,play]"
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation --no-deps audiocraft
	@touch $@

demo: $(STAMP)  ## the whole method on the shipped nano base: train, merge, evaluate, listen (ARGS=--quick: a smoke run)
	$(OFFLINE) $(BIN)/diverse-cfg demo $(ARGS)

test: $(STAMP)  ## every test that needs neither accelerator nor network
	$(OFFLINE) $(BIN)/python -m pytest -m "not gpu and not network" $(ARGS)

test-quick: $(STAMP)  ## the same without the slow ones
	$(OFFLINE) $(BIN)/python -m pytest $(ARGS)

# The lowest versions that pyproject.toml allows, e.g. trl==1.7.*, in an environment of their own.
LOWEST_BIN = $(VENV)-lowest/bin
LOWEST_OF = trl peft accelerate transformers
test-lowest: $(STAMP)  ## the trainer's tests with the lowest supported TRL, transformers, peft and accelerate
	$(BIN)/python -m venv --clear $(VENV)-lowest
	for name in $(LOWEST_OF); do grep -oE "\"$$name>=[0-9.]+" pyproject.toml; done | tr -d '"' | sed 's/>=/==/; s/$$/.*/' \
		> $(VENV)-lowest/lowest.txt
	grep -vE "^($$(echo $(LOWEST_OF) | tr ' ' '|'))==" constraints.txt > $(VENV)-lowest/constraints.txt
	$(LOWEST_BIN)/python -m pip install -c $(VENV)-lowest/constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(LOWEST_BIN)/python -m pip install -c $(VENV)-lowest/constraints.txt hatchling editables pytest
	$(LOWEST_BIN)/python -m pip install -c $(VENV)-lowest/constraints.txt --no-build-isolation \
		-r $(VENV)-lowest/lowest.txt -e .
	$(OFFLINE) $(LOWEST_BIN)/python -m pytest -m "not gpu and not network" tests/test_trainer*.py tests/test_cli_train.py $(ARGS)

lint: $(STAMP)  ## ruff (rules and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## let ruff fix and format the tree
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(STAMP)  ## install the pre-commit hooks (they call the tools of .venv; nothing is downloaded)
	$(BIN)/pre-commit install

house: $(STAMP)  ## how much there is to read: lines, definitions, the files of one training step
	$(OFFLINE) $(BIN)/python benchmarks/house.py $(ARGS)

build: $(STAMP)  ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

docs: $(STAMP)  ## the site in build/site, strictly: the Markdown that is here, and a reference from the code
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[docs]"
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

clean:  ## remove .venv, caches and dist/
	rm -rf $(VENV) $(VENV)-lowest dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
