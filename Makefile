# Two commands do everything on a fresh machine with Python 3.10 to 3.13, git and make:
#   make verify     run the claims of the book         (make verify PAPERS="lion" SEEDS=5 JOBS=2)
#   make test       notebooks, library and tests
# and: make docs, make lab, make bench, make clean
PYTHON ?= python3
PAPERS ?=
SEEDS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help verify test docs lab bench clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile

$(VENV)/.course: pyproject.toml tools/env.sh
	@PYTHON="$(PYTHON)" sh tools/env.sh course $(VENV)

$(VENV)/.dev: pyproject.toml tools/env.sh
	@PYTHON="$(PYTHON)" sh tools/env.sh dev $(VENV)

verify: $(VENV)/.course
	@$(BIN)/paperbook verify $(PAPERS) --jobs $(JOBS) $(if $(SEEDS),--seeds $(SEEDS))

test: $(VENV)/.dev
	@$(BIN)/python tools/check.py

bench: $(VENV)/.dev
	@$(BIN)/paperbook bench

docs: $(VENV)/.dev
	@command -v quarto >/dev/null || { echo "make docs needs Quarto, which is not a Python package: https://quarto.org/docs/get-started"; exit 2; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev-docs

lab: $(VENV)/.course
	@$(BIN)/jupyter lab nbs/index.ipynb

clean:
	rm -rf $(VENV) build dist reports _docs _site *.egg-info
