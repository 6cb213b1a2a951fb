# Every target sets up what it needs in .venv. On a machine without a GPU, put torch's CPU build there first if your
# package index offers one: the plain `torch` brings gigabytes of CUDA.
PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)
OUT ?= demo-out
STORE ?= local
STEPS ?= 330
PORT ?= 8000
BIN := .venv/bin
# The environment is made again when PYTHON names another version than the one it was made with.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

.PHONY: demo serve test test-all lint clean

demo: .venv/demo  ## the whole path on handwritten digits; STORE=s3 keeps the data in an S3 server
	$(BIN)/python jobs/demo.py --out $(OUT) --store $(STORE) --steps $(STEPS)

serve: .venv/demo  ## serve the demo's release
	@test -f $(OUT)/release/config.json || { echo "no release in $(OUT): run 'make demo' first"; exit 1; }
	@echo "once it serves, the page is at http://127.0.0.1:$(PORT)/, and this finishes a digit twice:"
	@echo "  curl -s http://127.0.0.1:$(PORT)/v1/completions -F n=2 -F image=@$(OUT)/picture.png"
	$(BIN)/python jobs/serve.py --release digits=$(OUT)/release --heads digit=$(OUT)/probe --open --port $(PORT)

test: .venv/dev  ## every claim of the README, in minutes
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow and not long"
	$(BIN)/python -m pytest -m "ray and not slow and not long"

test-all: .venv/dev  ## also kills, faults, load and deployment; not the tests marked long
	$(BIN)/python -m pytest -n 2 -m "not ray and not long"
	$(BIN)/python -m pytest -m "ray and not long"

lint: .venv/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and the demo's output
	rm -rf .venv $(OUT)

.venv/torch: constraints.txt .venv/python-$(VERSION)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@touch $@

.venv/python-$(VERSION):
	@case "$(VERSION)" in 3.11|3.12|3.13) ;; *) \
	  echo "igpt_ray needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is version '$(VERSION)'."; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1;; esac
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,demo]'
	@touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/demo
