# Two commands on a fresh machine: `make pretrain` and `make test`. Both make .venv at the first run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for the trainer, for example: make pretrain RUN=runs/seed-1 ARGS="--seed 1"
ARGS ?=
RUN ?= runs/trashnet96
.PHONY: help pretrain test test-versions test-tritons mutants lint format bench clean

help:
	@echo "make pretrain       pretrain on the embedded image set, evaluate, write a report"
	@echo "make test           linters, type checker and all tests"
	@echo "make test-versions  kernels with every Triton, the loss with the oldest and newest PyTorch"
	@echo "make test-tritons   a part of the kernel tests with the oldest and the newest Triton"
	@echo "make mutants        plant small faults in the code and count those that the tests find (hours)"
	@echo "make bench          SIGReg benchmark of this machine, rows and plot in bench/results/"
	@echo "make format         format the code"
	@echo "make clean          remove caches and build products (keeps .venv and runs)"

# Of six untrained encoders resnet14t is the best one on the embedded images (docs/evaluation.md): the report shows
# it beside the trained encoder.
pretrain: $(VENV)/.installed
	@$(BIN)/python train/pretrain.py --preset laptop --out $(RUN) --eval.backbone resnet14t:untrained $(ARGS)

# Tests start many processes: each has one thread, and idle OpenMP threads sleep instead of spinning.
# The files are shared between two test processes; most tests keep one core busy. In their own order: the default
# starts the files of few tests, which are the long ones, last.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: export OMP_NUM_THREADS ?= 1
test: lint
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-versions: $(VENV)/.installed-dev
	@$(BIN)/python -m nox

test-tritons: $(VENV)/.installed-dev
	@$(BIN)/python -m nox --session kernels_short

mutants: $(VENV)/.installed-dev
	@$(BIN)/python tests/mutants.py $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed-dev
	@$(BIN)/python bench/sigreg_bench.py --sweep

format: $(VENV)/.installed-dev
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# No environment, or one whose interpreter has gone: made anew, then installed into whatever its stamps say.
MISSING := $(shell $(BIN)/python -c '' 2>/dev/null || echo FORCE)

define make_environment
	@command -v $(PYTHON) >/dev/null \
		|| { echo "error: $(PYTHON) is not installed; Python 3.10 or newer is needed"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: Python 3.10 or newer is needed, $(PYTHON) is older; call make PYTHON=python3.x"; exit 2; }
	@test -z "$(MISSING)" || $(PYTHON) -m venv --clear $(VENV) \
		|| { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed (on Debian: apt-get install python3-venv)"; exit 2; }
endef

.PHONY: FORCE
FORCE:

# Re-installed when what they are made from changes; otherwise the environment is reused.
$(VENV)/.installed: pyproject.toml setup.py $(MISSING)
	$(make_environment)
	@echo "installing lejepa_fast into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py $(MISSING)
	$(make_environment)
	@echo "installing lejepa_fast with its development tools into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed
