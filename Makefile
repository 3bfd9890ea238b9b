# What a contributor runs. One virtual environment, .venv, made from nothing and kept until pyproject.toml or constraints.txt change.

PYTHON ?= python3
INDEX ?=
PYTEST_ARGS ?= -q -n 2

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet $(if $(INDEX),--index-url $(INDEX)) --constraint constraints.txt
PINS := pyproject.toml constraints.txt
DIGITS := examples/digits

.PHONY: demo test lint bench clean
.NOTPARALLEL: # two installations into one environment must not meet

demo: .venv/.demo-ready
	$(BIN)/effc optimize $(DIGITS)/digits.onnx --passes 'simplify,fold-batchnorm,int8' \
		--calibrate '$(DIGITS)/digits-train.yaml{limit=256}' --evaluate $(DIGITS)/digits-test.yaml -o digits-effc.onnx

test: .venv/.test-ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.test-ready
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/.test-ready
	set -e; for script in $(wildcard benchmarks/[a-z]*.py); do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis digits-effc.onnx
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.venv/.demo-ready: $(PINS) | $(BIN)/python
	$(INSTALL) --editable '.[examples]'
	touch $@

# torch is optional to effc, and a part of its tests: those that need it skip where it is absent
.venv/.test-ready: $(PINS) | $(BIN)/python
	$(INSTALL) --editable '.[dev,examples,torch]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
