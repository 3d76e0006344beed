# From a fresh clone: `make demo` runs the whole loop, `make space` opens the Space, `make test` runs the
# tests, `make docs` builds the site. All install what they need first.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

# One thread for each worker: with more, the workers of pytest-xdist fight for the cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

.PHONY: install demo space test slow docs base clean

install: $(VENV)/.installed

# torch goes first, so that no other package pulls a later build of it
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,docs,space]"
	touch $@

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/onereward demo

# the page to paint and to vote on, at http://127.0.0.1:7860; votes are kept in spaces/onereward-arena/data
space: install
	HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False $(BIN)/python spaces/onereward-arena/app.py

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS)

# trains the embedded base anew; its weights go to runs/base
base: install
	$(BIN)/python trainers/sft.py --config trainers/configs/sft_phantom.yaml

slow: install
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --timeout 3600

# the site goes to build/site; a broken link fails it
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
