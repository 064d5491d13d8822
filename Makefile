# Everything one does with this repository. Plain `make` lists the targets; ARGS adds arguments to the command behind one.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo dev test test-sdk check audit fuzz model simulate crash bench clean lock anew

BIN := .venv/bin
STAMP := .venv/.stamp

# The first Python from 3.11 on that can make a virtual environment, or, for want of one, that starts at all; the caller's own `python3` is asked
# first. Each is tried, because a version manager may put names on the path that do not start.
PYTHON ?= $(shell for modules in 'sys, ensurepip' 'sys'; do \
	for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c "import $$modules; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1 && echo "$$name" && exit; done; done)

define need_python
@"$(or $(PYTHON),false)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "Mollifier needs Python 3.11 or later. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## start everything, play a burst of triggers through it, show what happened, stop
	@$(BIN)/mollifier demo $(ARGS)

dev: $(STAMP) ## start everything for development and keep it running; prints the URL and an API key
	@$(BIN)/mollifier dev $(ARGS)

test: $(STAMP) ## run the tests, with a few seconds of fuzzing
	@MOLLIFIER_FUZZ_SECONDS="$${MOLLIFIER_FUZZ_SECONDS:-5}" $(BIN)/pytest -n 2 -m 'not crash and not sdk' $(ARGS)

test-sdk: $(STAMP) ## run the official SDK from npm against a Mollifier in divert mode; needs Node.js
	@$(BIN)/pytest -m sdk -v -rs -s $(ARGS) tests/sdk

check: $(STAMP) audit ## lint, formatting, types, import layers, known vulnerabilities of what is installed
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

audit: $(STAMP) ## ask which pinned packages have known vulnerabilities; one that nobody can tell of is named, and no failure
	@$(BIN)/python scripts/audit.py

fuzz: $(STAMP) ## fuzz for MOLLIFIER_FUZZ_SECONDS (300), from MOLLIFIER_FUZZ_SEED if given
	@MOLLIFIER_FUZZ_SECONDS="$${MOLLIFIER_FUZZ_SECONDS:-300}" $(BIN)/pytest -m fuzz --timeout 0 $(ARGS)

model: $(STAMP) ## hold the buffer against its model for MOLLIFIER_MODEL_STEPS (1,000,000), from MOLLIFIER_MODEL_SEED if given
	@MOLLIFIER_MODEL_STEPS="$${MOLLIFIER_MODEL_STEPS:-1000000}" $(BIN)/pytest -s --timeout 0 $(ARGS) tests/model -k every_step

simulate: $(STAMP) ## play MOLLIFIER_SIM_SEEDS (10,000) simulated worlds, from MOLLIFIER_SIM_SEED if given, on all cores
	@$(BIN)/python -m tests.simulation $(ARGS)

crash: $(STAMP) ## kill processes at every single step that they take, from MOLLIFIER_CRASH_SEED if given; about five minutes
	@$(BIN)/pytest -n 2 -m crash -s $(ARGS) tests/crash

bench: $(STAMP) ## measure: runs what is in benchmarks/
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove the environment, the caches and the data of `make dev`
	@rm -rf .venv .venv.lock .mollifier tests/sdk/node_modules build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache .schemathesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## pin the newest versions that work together in requirements/
	$(need_python)
	@"$(PYTHON)" scripts/lock.py

$(STAMP): pyproject.toml requirements/dev.txt scripts/bootstrap.py
	$(need_python)
	@"$(PYTHON)" scripts/bootstrap.py

# A checkout that was moved, or whose Python is gone, has its environment made anew.
ifneq ($(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): anew
endif
anew:
