# `make demo` and `make test` need only python3 (3.10 or newer) with pip: they make .venv themselves.

PYTHON ?= python3
# More arguments for pytest: make test PYTEST_ARGS="-k optimizer"
PYTEST_ARGS ?=
# Test processes at a time; each needs a core and up to 4 GB.
JOBS ?= 2
LONGEST := random_cases coupled_loss exact_batch_norm multi_worker evaluation batch_norm \
	callbacks non_finite replicas replicas_contract model_losses gradient_checkpointing exact_mean \
	one_device equivalence model_data model_training package layer_swap wrapped_methods accum_steps \
	optimizer_contract

# Which benchmarks, and where their figures and pictures go: make benchmarks BENCHMARKS=memory
BENCHMARKS ?= overhead memory communication compile_time batch_norm coupled_loss checkpointing
RESULTS ?= benchmarks/results

# How many random trainings, and which: make fuzz FUZZ_EXAMPLES=1000 FUZZ_SEED=7
FUZZ_EXAMPLES ?= 300
FUZZ_SEED ?= $(shell date +%s)

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast coverage fuzz test-clients lint types docs picture test-oldest test-uncapped benchmarks clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

# The stamp comes last, so an interrupted installation starts afresh, as does one older than setup.cfg.
# The dev extra has what every target needs, so one installation serves them all.
$(STAMP): setup.cfg
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# TensorFlow's start-up notices would bury what these two print.
demo benchmarks: export TF_CPP_MIN_LOG_LEVEL = 2

demo: $(STAMP)  ## train the digits example
	$(RUN) examples/digits.py

# A process of its own for each long file, as TensorFlow keeps what was traced and tests in one
# process slow down; one for every few others, as TensorFlow takes seconds to start. The longest come
# first, so that all JOBS end at about the same time.
# Pytest's status 5 says that no file has a test that PYTEST_ARGS selects, or that all need what is
# missing.
LONG := $(LONGEST:%=tests/test_%.py) tests/clients/test_keras_hub.py
test: export PYTEST_ARGS := $(PYTEST_ARGS)
test: $(STAMP)  ## run the test suite, in JOBS processes at a time
	@{ printf '%s\n' $(LONG); printf '%s\n' $(filter-out $(LONG),$(wildcard tests/test_*.py)) | xargs -n 4; } \
		| xargs -P $(JOBS) -L 1 sh -c \
		'eval "$(RUN) -m pytest $$PYTEST_ARGS $$*" || [ $$? -eq 5 ] || { echo "FAILED: $$*"; exit 1; }' -

# Few processes, as each starts TensorFlow; a file that PYTEST_ARGS leaves without tests is no fault.
test-fast: export PYTEST_ARGS := $(PYTEST_ARGS)
test-fast: $(STAMP)  ## run the core of every feature, in under 4 minutes on 2 cores
	@printf '%s\n' tests/test_*.py | xargs -P $(JOBS) -n 12 sh -c \
		'eval "$(RUN) -m pytest -q -m fast $$PYTEST_ARGS $$*" || [ $$? -eq 5 ] || exit 1' -

coverage: $(STAMP)  ## run the test suite, and list the branches of the package that it does not take
	$(RUN) -m coverage erase
	$(MAKE) test RUN="$(RUN) -m coverage run --branch --parallel-mode --source=gradient_accumulator_tf"
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report --show-missing --skip-covered

fuzz: export FUZZ_EXAMPLES := $(FUZZ_EXAMPLES)
fuzz: $(STAMP)  ## compare random trainings with the large batch; a failure is printed as a script
	$(RUN) -m pytest tests/test_random_cases.py --hypothesis-seed=$(FUZZ_SEED)

# An environment of its own: these packages bring a hundred others, and constraints on versions.
CLIENTS := .venv-clients
$(CLIENTS)/.installed: setup.cfg
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,clients]'
	@touch $@

test-clients: $(CLIENTS)/.installed  ## run the tests with KerasHub, KerasTuner, MLflow and the like
	$(CLIENTS)/bin/python -m pytest tests/clients $(PYTEST_ARGS)

lint: $(STAMP)  ## check style and formatting
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

types: $(STAMP)  ## check the types of the package, and of a user's script and mistakes
	$(RUN) -m mypy

# -E reads all pages anew, as the API reference depends on the package and not on pages only.
docs: $(STAMP)  ## build the documentation into docs/_build
	$(RUN) -m sphinx -E -W --keep-going -q -b html docs docs/_build/html

picture: $(STAMP)  ## draw the package's folders and imports for docs/design.md
	$(RUN) docs/make_layout_picture.py

test-oldest: $(STAMP)  ## run the suite on the oldest supported TensorFlow and Keras
	$(RUN) -m nox --session tests_oldest -- $(PYTEST_ARGS)

test-uncapped: $(STAMP)  ## run the suite on the newest TensorFlow and Keras that there are
	$(RUN) -m nox --session tests_uncapped -- $(PYTEST_ARGS)

benchmarks: $(STAMP)  ## measure time, memory, traffic and batch norm
	@mkdir -p $(RESULTS)
	@failed=; for name in $(BENCHMARKS); do \
		echo "## $$name"; \
		$(RUN) -m benchmarks.$$name --json $(RESULTS)/$$name.json --plot $(RESULTS)/$$name.png \
			|| failed="$$failed $$name"; \
	done; [ -z "$$failed" ] || { echo "FAILED:$$failed"; exit 1; }

clean:  ## remove the environments, caches and builds
	rm -rf .venv .venv-clients .nox .hypothesis .pytest_cache .ruff_cache build dist docs/_build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
