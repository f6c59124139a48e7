# Everything runs from .venv, which the first target that needs it makes and fills with the versions
# pinned in .ci/constraints.txt. A stamp is touched only after a whole install.
MAKEFLAGS += --no-print-directory
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c .ci/constraints.txt
PINS := pyproject.toml .ci/constraints.txt
TORCH := 2.13.0
# What checks the TypeScript of widgets/, where npm is there to install it; without npm those tests are skipped.
NODE := $(if $(shell command -v npm),widgets/node_modules/.package-lock.json)

.PHONY: help demo test soak lab docs bench lint format constraints release clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: .venv/.base ## run the main job; the last line printed is the report's path (ARGS="--seed 1")
	@.venv/bin/qtx-lab demo $(ARGS)

lab: .venv/.base ## JupyterLab on notebooks/
	@.venv/bin/qtx-lab lab $(ARGS)

docs: .venv/.docs ## the documentation, in build/docs; notebooks are executed once (ARGS="-D nb_execution_mode=off")
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python -m sphinx -q -W --keep-going -b html -d build/docs-doctrees $(ARGS) \
	  notebooks build/docs
	@echo "build/docs/index.html"

bench: .venv/.base ## side-by-side benchmark (NAME=samplers ARGS=--quick)
	@.venv/bin/qtx-lab bench $(or $(NAME),samplers) $(ARGS)

# Three files at a time keep two cores busy while one of them waits for a browser or a kernel.
test: .venv/.test $(NODE) ## all tests that this machine can run, three files at a time (ARGS="-k wheel -n 0")
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: .venv/.test $(NODE) ## all tests with long schedules
	@QTX_LAB_SOAK=1 .venv/bin/python -m pytest --timeout=7200 $(ARGS)

lint: .venv/.test ## style, types and layers, without the other tests
	@.venv/bin/python -m pytest tests/test_house.py

format: .venv/.test ## put the code in the house style
	@.venv/bin/ruff check --quiet --fix . ; .venv/bin/ruff format .

# The report of a dry run names every version without a download. === asks for the registry's own torch,
# the CUDA build, even where a CPU build (2.13.0+cpu) is on offer: its needs are then pinned too, and the
# pins fit both builds.
constraints: .venv/.made ## choose new pins: the newest that pyproject.toml allows (ARGS="-c FILE" to hold some)
	@t=$$(mktemp -d) && trap 'rm -rf "$$t"' EXIT && .venv/bin/python -m venv "$$t/venv" \
	&& "$$t/venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip \
	&& "$$t/venv/bin/python" -m pip install --quiet --dry-run --ignore-installed --report "$$t/report.json" \
	   $(ARGS) ".[test,docs,gpu,hf,llm,mlflow,release]" "torch===$(TORCH)" \
	&& printf '%s\n' '# The versions that are tested: everything that .[test,docs,gpu,hf,llm,mlflow,release] needs. Made by `make constraints`' \
	   '# on Linux; not edited by hand.' > "$$t/pins" \
	&& .venv/bin/python -c 'import json, re, sys; \
	   found = {re.sub(r"[-_.]+", "-", m["name"]).lower(): m["version"].partition("+")[0] \
	            for m in (i["metadata"] for i in json.load(open(sys.argv[1]))["install"])}; \
	   print(*(f"{n}=={v}" for n, v in sorted(found.items()) if n not in {"qtx-lab", "pip", "setuptools"}), sep="\n")' \
	   "$$t/report.json" >> "$$t/pins" \
	&& cp "$$t/pins" .ci/constraints.txt

release: .venv/.base ## show, build and check a release; ARGS=--commit commits and tags it (VERSION=0.2.0)
	@$(INSTALL) -e '.[release]'
	@PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/python .ci/release.py "$(VERSION)" $(ARGS)

clean: ## remove what make and the tests made, .venv too; runs/ stays
	rm -rf .venv dist build notebooks/reference/api .ruff_cache .mypy_cache .pytest_cache .hypothesis .import_linter_cache

.venv/.made:
	@for python in $(PYTHON) python3 python3.12 python3.11 python3.13; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    "$$python" -m venv .venv && touch $@; exit; \
	  fi; \
	  tried="$$tried $$python ($$("$$python" --version 2>/dev/null || echo 'not found'))"; \
	done; \
	echo "qtx_lab needs Python 3.11 or newer. Tried:$$tried. Name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

.venv/.base: $(PINS) | .venv/.made
	@echo "Installing qtx_lab into .venv (a few minutes the first time) ..." >&2
	@$(INSTALL) -e '.[lab]' && touch $@

.venv/.docs: $(PINS) | .venv/.made
	@echo "Installing qtx_lab and what its documentation needs into .venv (a few minutes the first time) ..." >&2
	@$(INSTALL) -e '.[docs]' && touch .venv/.base
	@.venv/bin/qtx-lab model smollm2-135m >/dev/null && touch $@

.venv/.test: $(PINS) | .venv/.made
	@echo "Installing qtx_lab and what its tests need into .venv (a few minutes the first time) ..." >&2
	@$(INSTALL) -e '.[test]' && touch .venv/.base
	@.venv/bin/qtx-lab model smollm2-135m >/dev/null && touch $@
	@command -v chromium chromium-browser google-chrome >/dev/null || ! command -v apt-get >/dev/null \
	|| test "$$(id -u)" != 0 || apt-get install -y -q chromium

# A failed install is tried once more, this time with its messages.
widgets/node_modules/.package-lock.json: widgets/package-lock.json
	@cd widgets && { npm ci --silent || npm ci; } && touch node_modules/.package-lock.json
