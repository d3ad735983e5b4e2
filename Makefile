# Each target alone, on a fresh clone with Python >= 3.11 and make, sets up .venv and does its job.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test parity lint notebooks bench clean

demo: .venv/.installed
	$(BIN)/python -m experiments.image_models.digits

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

parity: .venv/.parity
	$(BIN)/python -m pytest tests/parity

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

notebooks: .venv/.installed
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks/

bench: .venv/.installed
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.samplers
	$(BIN)/python -m benchmarks.likelihood

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/.parity: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	touch $@

clean:
	rm -rf .venv .cache build *.egg-info
