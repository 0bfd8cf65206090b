# One-command entry points. `make demo` and `make test` work on a bare machine with Python 3.11 and a C++ compiler.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := QUIRE_DATA_DIR=.demo/data QUIRE_CACHE_DIR=.demo/cache QUIRE_CONFIG_DIR=.demo/config $(BIN)/quire

.PHONY: demo test test-kernels check lint format install clean

demo: install
	$(DEMO) add assets/sample
	$(DEMO) ask "Who was the engineer of the lighthouse at Grey Point?"
	$(DEMO) ask "How many litres does the barrel behind the shed hold?"
	$(DEMO) ask "Who ground the mirror of the telescope?"

# Files of tests side by side, each on a core that few others share (tests/conftest.py), in their order: what takes long
# with few tests does not come last and alone.
test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Kernels against their specifications, interpreted, and compiled for devices that are not here. On a graphics device:
# TRITON_INTERPRET=0 make test-kernels
test-kernels: install
	$(BIN)/python -m pytest tests/unit/test_triton_*.py

check: lint test

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Compiling llama-cpp-python takes 6 to 18 minutes on two cores the first time; pip keeps the wheel for the next.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "Installing into $(VENV). The first time this compiles llama-cpp-python: 6 to 18 minutes on two cores."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) .demo dist build
