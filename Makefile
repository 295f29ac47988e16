# Both targets make their own environment from nothing. PYTHON picks the interpreter that builds it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo

pip = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.demo  ## fine-tune on the bundled medical data and write a report
	PYTHON=$(VENV)/bin/python bash scripts/run_medical_pipeline.sh --out $(OUT)

test: $(VENV)/.test  ## the whole test suite
	$(VENV)/bin/python -m pytest -q

lint: $(VENV)/.test  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(pip) --editable '.[medical]'
	# The volumes inside these packages are read as files; what the packages' code would need is not installed.
	$(pip) --no-deps TPTBox nilearn
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(pip) --editable '.[medical,dicom,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
