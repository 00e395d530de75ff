# make demo: install and train the built-in example offline.   make test: everything that CI checks.
PYTHON ?= python3
VENV := .venv
TORCH_INDEX ?=    # where PyTorch keeps its builds without CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test bench chaos install clean

demo: $(INSTALLED)
	$(BIN)/sl-queue demo

test: $(INSTALLED)
	sh tests/obtain_broker.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # two files at a time: they mostly wait

# How fast it is here against the alternatives, in under ten minutes; tables and plots in benchmarks/results.
bench: $(INSTALLED)
	sh tests/obtain_broker.sh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c ops/constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

# A few minutes: thirty workers killed, three times the broker, connections cut, and not one bit of the weights differs.
chaos: $(INSTALLED)
	sh tests/obtain_broker.sh
	cd examples/credit && $(CURDIR)/$(BIN)/sl-queue chaos chaos.toml bank.toml insurer.toml --kills 30 --broker-restarts 3 --cuts 6 --seed 1

install: $(INSTALLED)

$(INSTALLED): pyproject.toml ops/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(strip $(TORCH_INDEX)),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c ops/constraints.txt -e '.[test]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
