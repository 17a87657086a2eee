# Two commands do everything: `make demo` and `make test`. Both make their own environment first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes; a file's tests stay together.
TWICE := -n 2 --dist loadfile
# Where others use the machine as well, a process may starve beyond a test's patience: such a test runs once more, and the
# summary counts it.
AGAIN := --reruns 1

.PHONY: help demo serve test slow unit lint types install page clean

help:
	@echo "make demo   install, then generate, train, evaluate and report on the pocket world (about 15 minutes on 2 idle cores)"
	@echo "make serve  install, then serve the pocket world and what make demo has trained, with a page, on this machine"
	@echo "make test   install, then run all tests but those that take many minutes each, which are for make slow"
	@echo "make unit   only the tests that need no Ray"
	@echo "make lint   ruff;  make types   mypy"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

install: $(STAMP)

serve: $(STAMP)
	$(BIN)/python jobs/serve.py

demo: $(STAMP)
	$(BIN)/python jobs/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest $(TWICE) $(AGAIN) tests/unit
	$(BIN)/python -m pytest $(TWICE) $(AGAIN) -m "not slow and not alone" --durations=12 tests/k8s tests/browser tests/cluster tests/gpu
	$(BIN)/python -m pytest $(TWICE) $(AGAIN) -m alone tests/cluster

slow: $(STAMP)
	$(BIN)/python -m pytest $(AGAIN) -m slow tests/cluster

unit: $(STAMP)
	$(BIN)/python -m pytest $(TWICE) $(AGAIN) tests/unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The page that the server shows; users need neither node nor this: what it writes is in the repository.
page:
	cd introspect_ray/serving/web && npm ci && npm run build

clean:
	rm -rf $(VENV) runs
