# Convenience over plain pip and jaxherd commands; the README shows both.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LINE := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/$(LINE).txt

.PHONY: demo test lint types floors install install-dev wheel test-slow test-oracle test-harness test-gpu-compile test-tpu-compile-full clean

demo: install
	$(BIN)/jaxherd run llama4/scout --on cpu

# Lint, types, import floors and the default tests, on the wheel that users would install.  A worker
# that is lost ends the run: with one in its place it would wait for ever.
test: install-dev lint types floors
	$(BIN)/pytest -q -n 2 --dist loadfile --max-worker-restart 0

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/pyright

floors:
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	$(PIP) '.[demo]'

install-dev: $(BIN)/python
	$(PIP) '.[dev,tpu]'

wheel: install-dev
	$(BIN)/python -m build --wheel

test-slow:
	$(BIN)/pytest -q -m slow

# Needs another environment with torch and transformers: each generator under tests/golden/ names what it needs.
test-oracle:
	$(BIN)/pytest -q -m oracle

# Needs jaxherd[eval], which is not part of install-dev: it is large.
test-harness:
	$(BIN)/pytest -q -m harness

test-gpu-compile:
	$(BIN)/pytest -q -m gpu_compile

# Every kernel and full-width program for every generation of TPU; no TPU is needed, the compiler comes with install-dev.
test-tpu-compile-full:
	$(BIN)/pytest -q -n 2 --dist loadfile --max-worker-restart 0 -m tpu_compile_full

clean:
	rm -rf $(VENV) dist build runs
