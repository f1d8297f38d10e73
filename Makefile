# make demo   train and evaluate on the embedded digits, write a report, export
# make test   the test suite
# make lint   ruff, mypy, and the guide built without warnings
# make docs   the guide as a site, in docs/_build/html
# make app    a page on this machine: drop an image, and watch where it leaves
# make gpu    on a machine with a GPU: the tests that need one, and what is saved in time there
# make sweep  slow checks over all of timm's architectures, and tables written to runs/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMOABLE := $(VENV)/.demo
READY := $(VENV)/.ready
DEMO := runs/demo
SITE := $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

# A worker that dies names its test, and another takes the rest. (--dist loadfile loses the tests of that file.)
SURVIVE := --dist worksteal --max-worker-restart 1000

# Progress is seen as it happens, also where stdout is no terminal.
export PYTHONUNBUFFERED := 1

.PHONY: demo test lint docs app gpu sweep clean

demo: $(DEMOABLE)
	rm -rf $(DEMO)
	$(BIN)/python -m training.train --recipe models/digits/recipe.yaml --out $(DEMO)
	$(BIN)/python -m eval.report $(DEMO)
	$(BIN)/python -m eval.deploy --run $(DEMO) --out $(DEMO)/stages --eager false

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 $(SURVIVE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SITE)

docs: $(READY)
	$(SITE)
	@echo "guide: docs/_build/html/index.html"

app: $(READY)
	$(BIN)/python -m eval.app

gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python -m eval.gpu --out runs/gpu.json

sweep: $(READY)
	$(BIN)/python -m eval.coverage --out runs/coverage.csv
	$(BIN)/python -m pytest -q -m sweep

# What the demo needs; all that tests, checks and the guide need besides.
$(DEMOABLE): pyproject.toml
	$(call install,train$(comma)report$(comma)deploy)
	touch $@

$(READY): pyproject.toml
	$(call install,dev)
	touch $(DEMOABLE) $@

comma := ,
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and all else that is needed: about 6 GB, some minutes"
	@(s=0; while sleep 10 >/dev/null 2>&1; do s=$$((s + 10)); echo "... installing, $$s s"; done) & beat=$$!; \
	$(BIN)/python -m pip install --progress-bar off --editable '.[$(1)]'; failed=$$?; kill $$beat; exit $$failed
endef

clean:
	rm -rf $(VENV) dist build docs/_build
