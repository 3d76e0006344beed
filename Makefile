# From a fresh clone: `make demo` runs the whole loop, `make test` the tests. Both install what they need first.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

# One thread for each worker: with more, the workers of pytest-xdist fight for the cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

.PHONY: install demo test slow base clean

install: $(VENV)/.installed

# torch goes first, so that no other package pulls a later build of it
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/onereward demo

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS)

# trains the embedded base anew; its weights go to runs/base
base: install
	$(BIN)/python trainers/sft.py --config trainers/configs/sft_phantom.yaml

slow: install
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --timeout 3600

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
