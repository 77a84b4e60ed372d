# make demo — everything set up, real task models merged, evaluated and registered
# make test — everything needed to pass the tests, from nothing
# Both are safe to run again and in either order; both work in .venv and touch nothing outside this folder but pip's cache.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that spin while they wait make two jobs on one core many times slower.
export OMP_WAIT_POLICY := PASSIVE
# Half of the tests wait for servers: two files side by side fill two cores.
PYTEST_ARGS ?= -n 2 --dist loadfile --durations 15
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test check format install clean

demo: $(VENV)/installed
	$(if $(filter services,$(STACK)),$(BIN)/python infra/native.py run -- )$(BIN)/poemerge demo

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(PYTEST_ARGS)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed

# torch is named first and alone: with it in place no other package pulls the CUDA builds.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Only what can be made again; data/, artifacts/ and the registry stay.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
