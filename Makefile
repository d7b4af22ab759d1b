# `make` alone prints this file's targets. `make demo` and `make test` need nothing but git,
# python3 >= 3.11 and make: what is missing is installed first, step by step.

BIN := .venv/bin
READY := .venv/ready
COVERAGE := --cov --cov-report=term
SOURCES := pytest_vmsandbox tests examples benchmarks conftest.py hatch_build.py

.DEFAULT_GOAL := help
.PHONY: help demo test tiers check format lint types layers docs bench interpreters clean

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | column -t -s:

$(READY): pyproject.toml hatch_build.py .ci/prepare
	@.ci/prepare

demo: $(READY)  ## install what is missing, build the default image, run examples/ on real machines
	$(BIN)/vmsandbox image build
	$(BIN)/pytest examples/test_first_steps.py
	$(BIN)/pytest examples -n 2

test: $(READY)  ## the same set-up, then the whole suite, with coverage
	$(BIN)/python -m pytest -n 2 --dist worksteal $(COVERAGE) --durations=15

tiers: $(READY)  ## machines and walls in each tier, all in userns, as users made for it; takes root (TIER=bare, WHOLE=1)
	$(BIN)/python -m tests.tiers $(TIER) $(if $(WHOLE),--whole)

check: COVERAGE :=  # it tells, and fails nothing
check: $(READY) format lint types layers demo interpreters test  ## everything that a change must pass

format: $(READY)  ## is everything formatted?
	$(BIN)/ruff format --check $(SOURCES)

lint: $(READY)  ## ruff
	$(BIN)/ruff check $(SOURCES)

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

layers: $(READY)  ## rooms import downward only
	$(BIN)/lint-imports --no-cache

docs: $(READY)  ## run what README.md and docs/ show
	$(BIN)/pytest tests/repository/test_documents.py

interpreters: $(READY)  ## the parts that need no machine, under every Python from 3.11 to 3.13 found but .venv's
	@.ci/interpreters

bench: $(READY)  ## the benchmarks, as ratios, side by side in one run (docs/benchmarks.md)
	$(BIN)/python -m benchmarks

clean:  ## remove what was made in this directory; images stay in the cache
	rm -rf .venv .venvs .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
