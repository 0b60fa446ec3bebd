# make quickstart   prompts -> replies -> cache -> training -> export -> report, on the embedded target
# make test         the test suite          make check     ruff and mypy
# make bench        the dated benchmarks    make embedded  train the embedded models from scratch (over an hour)
# make wheel        dist/*.whl              make clean     remove what make built, but not runs/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.DELETE_ON_ERROR:
.PHONY: quickstart test check bench embedded wheel clean install install-dev

# torch goes first: on a machine that offers a CPU build of the pinned version, the rest then settles on that one.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

test: install-dev
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(PYTEST_ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/link_packages.py
	$(BIN)/mypy

wheel: install-dev
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
