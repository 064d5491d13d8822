# Everything one does with this repository. Plain `make` lists the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
STAMP := .venv/.stamp

# The first Python from 3.11 on that starts, the caller's own choice first. Trying each is what tells: a version manager may put names on the path
# that do not start. An empty answer is explained where it is needed.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$name" && exit; done; \
	for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$name" && exit; done)

# A checkout that was moved, or whose Python is gone, needs its environment made anew.
ifneq ($(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): anew
endif

.PHONY: help demo dev test check fuzz bench clean lock anew

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## start everything, play a burst of triggers through it, show what happened, stop
	@$(BIN)/mollifier demo $(ARGS)

dev: $(STAMP) ## start everything for development and keep it running; prints the URL and an API key
	@$(BIN)/mollifier dev $(ARGS)

test: $(STAMP) ## run the tests, a short round of fuzzing among them
	@$(BIN)/pytest -n 2 $(ARGS)

check: $(STAMP) ## lint, formatting, types, layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports

fuzz: $(STAMP) ## fuzz for MOLLIFIER_FUZZ_SECONDS, from MOLLIFIER_FUZZ_SEED where given
	@$(BIN)/pytest -m fuzz --timeout 0 $(ARGS)

bench: $(STAMP) ## measure: runs what is in benchmarks/
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove the environment, caches, builds and the data of `make dev`
	@rm -rf .venv .venv.lock .mollifier build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache .schemathesis
	@find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

lock: ## pin the newest versions that work together in requirements/
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" scripts/lock.py

$(STAMP): pyproject.toml requirements/dev.txt scripts/bootstrap.py
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" scripts/bootstrap.py

anew:
