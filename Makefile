# Run `make help`. Everything happens in .venv, which `make install` creates.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Tests wait more than they compute. A file's tests stay together, since they share servers.
AT_ONCE := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo up down status test test-server lint format clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed  ## Create .venv and install the project with its development tools

demo: install  ## Label the sample data with the embedded model
	$(BIN)/clozeline run data/tickets/task.yaml

up: install  ## Start a Prefect server, its pools and workers, or what of them died
	deploy/cluster.sh up

down:  ## End them, with the runs under way
	deploy/cluster.sh down

status:  ## Tell what of them runs
	deploy/cluster.sh status

test: install  ## Lint, type-check and run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(AT_ONCE)

# Ray and Dask are large, and only these tests need them.
$(VENV)/installed-engines: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,ray,dask]'
	touch $@

test-server: $(VENV)/installed-engines  ## Run what takes a real server, workers and kills (about 25 minutes)
	$(BIN)/python -m pytest -q -m server $(AT_ONCE) --durations=0

lint: install  ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## Format the code
	$(BIN)/ruff format .

clean:  ## Remove the environment, the store and the releases made here
	deploy/cluster.sh down
	rm -rf $(VENV) .clozeline releases
