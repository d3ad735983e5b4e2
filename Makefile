# Each target alone, on a fresh clone with Python >= 3.11 and make, sets up .venv and does its job.
PYTHON ?= python3
# The Python of test-newest: jax's newest releases do not support the oldest Pythons that diffjax supports.
NEWEST_PYTHON ?= $(PYTHON)
# What test-oldest and test-newest run: files, or all tests if empty.
TESTS ?=
BIN := .venv/bin

.PHONY: demo test test-oldest test-newest parity lint notebooks bench package clean

demo: .venv/.installed
	$(BIN)/python -m experiments.image_models.digits

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-oldest: .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[experiments,test]'
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

test-newest: .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(NEWEST_PYTHON) .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest --editable '.[experiments,test]'
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

parity: .venv/.parity
	$(BIN)/python -m pytest tests/parity

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

notebooks: .venv/.installed
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks/

package: .venv/.installed
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --wheel --outdir dist/tree
	$(BIN)/python -m pytest tests/package

bench: .venv/.installed
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.samplers
	$(BIN)/python -m benchmarks.likelihood
	$(BIN)/python -m benchmarks.checkpoints

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/.parity: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch==3.3.0
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .cache build dist *.egg-info
