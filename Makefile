# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
TORCH_INDEX ?=    # where PyTorch keeps its builds without CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export PYTHONDONTWRITEBYTECODE :=  # hundreds of processes start in a run of the tests: what one compiled, the next reads

.DEFAULT_GOAL := demo
.PHONY: help demo check test test-pure bench chaos picture pictures install clean

help:  ## This list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## Install, and train the built-in example offline (the default).
	$(BIN)/sl-queue demo

check: $(INSTALLED)  ## What is checked without running anything: lint, format, types, imports, sizes and words.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest tests/repository -q

test: check  ## Everything that CI checks, some minutes: the static checks and all tests.
	sh tests/obtain_broker.sh
	sh tests/obtain_browser.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --ignore tests/repository  # four files at a time, which mostly wait, in tests/conftest.py's order

test-pure: $(INSTALLED)  ## The tests that need neither torch nor a broker, in seconds.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/pure -q -n 2 --dist worksteal

bench: $(INSTALLED)  ## How fast it is here against the alternatives, in under ten minutes: benchmarks/results.
	sh tests/obtain_broker.sh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c ops/constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

chaos: $(INSTALLED)  ## A few minutes of killed workers, broker and connections: not one bit of the weights differs.
	sh tests/obtain_broker.sh
	cd examples/numbers && $(CURDIR)/$(BIN)/sl-queue chaos chaos.toml bank.toml insurer.toml --kills 30 --broker-restarts 3 --cuts 6 --seed 1

picture: $(INSTALLED)  ## Draw docs/house.svg, the packages and what they import.
	$(BIN)/python ops/picture.py

pictures: $(INSTALLED)  ## Take the pictures of the documentation: the live page and a report of a real run.
	sh tests/obtain_broker.sh
	sh tests/obtain_browser.sh
	$(BIN)/python ops/pictures.py

install: $(INSTALLED)  ## The product, its tests and tools, into .venv.

$(INSTALLED): pyproject.toml ops/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(strip $(TORCH_INDEX)),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c ops/constraints.txt -e '.[test]'
	touch $(INSTALLED)

clean:  ## Remove what was installed and cached.
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
