# make demo   train and evaluate on the embedded digits, write a report
# make test   the test suite
# make lint   ruff and mypy
# make sweep  slow checks over all of timm's architectures, and tables written to runs/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: demo test lint sweep clean

demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/python -m training.train --recipe models/digits/recipe.yaml --out $(DEMO)
	$(BIN)/python -m eval.report $(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sweep: $(READY)
	$(BIN)/python -m eval.coverage --out runs/coverage.csv
	$(BIN)/python -m pytest -q -m sweep

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build
