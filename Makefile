# Two commands set everything up: `make quickstart` and `make test`. Needs Python 3.11 or later, pip and gcc.
# Where pip would fetch torch with CUDA, point it at PyTorch's CPU builds: make test PIP_ARGS="--extra-index-url ..."
PYTHON ?= python3
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet $(PIP_ARGS)
# Debian ships venv without ensurepip, which only the python3-venv package adds; pip can install itself from outside
MAKE_VENV = $(PYTHON) -m venv $(1) 2>/dev/null || \
	{ $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; }

# the C runtime in the tree, which an editable install runs
LIBRARY := tilewright/lib/libtilewright.so

.PHONY: quickstart test lint wheel smoke peers clean

quickstart: $(VENV)/installed-quickstart
	$(BIN)/python -m benchmarks.quickstart

# pytest comes last, so that its summary closes the output
test: lint smoke $(LIBRARY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# import-linter follows no links, so it reads the package as the wheel lays it out
lint: $(VENV)/installed-test wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd build/unpacked && $(CURDIR)/$(BIN)/lint-imports --no-cache --config $(CURDIR)/pyproject.toml

wheel: $(VENV)/installed-test
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >/dev/null
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/unpacked

$(LIBRARY): setup.py $(wildcard runtime/*.[ch]) $(VENV)/installed-test
	$(BIN)/python setup.py --quiet build_ext --inplace

# the wheel in an environment that holds nothing else, with neither gcc nor the repository in reach
smoke: wheel
	$(BIN)/python -m tests.toy build/toy.tw
	$(call MAKE_VENV,build/venv)
	build/venv/bin/python -m pip install --quiet $(PIP_ARGS) build/wheel/*.whl
	cd build && env PATH="$$PWD/venv/bin" venv/bin/python -I ../tests/wheel_smoke.py toy.tw
	$(BIN)/python -m tests.image_smoke examples/Dockerfile build/venv build/wheel/*.whl

# Environments of the engines that benchmarks compare with, one each; `make -k` goes on where one cannot be made.
# DeepSparse has no wheels for Python later than 3.11 and a licence for evaluation only: no other target needs it.
PEERS := .bench/envs
peers: $(patsubst benchmarks/peers/requirements/%.txt,$(PEERS)/%/installed,$(wildcard benchmarks/peers/requirements/*.txt))

$(PEERS)/deepsparse/installed: PYTHON := $(or $(shell command -v python3.11),$(PYTHON))

$(PEERS)/%/installed: benchmarks/peers/requirements/%.txt
	mkdir -p $(PEERS)
	$(call MAKE_VENV,$(@D))
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) -r $<
	touch $@

clean:
	rm -rf $(VENV) build .bench *.egg-info

$(VENV)/created:
	$(call MAKE_VENV,$(VENV))
	touch $@

$(VENV)/installed-quickstart: pyproject.toml $(VENV)/created
	$(INSTALL) -e '.[pipeline,bench]'
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/created
	$(INSTALL) -e '.[dev,pipeline,bench,tune,serve]'
	touch $@
