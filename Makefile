PYTHON ?= python3
BIN := .venv/bin
THROUGHPUT = $(BIN)/python benchmarks/throughput.py --arch swin_l --device cuda
.PHONY: venv bench resources test test-slow lint test-gpu bench-gpu tune

venv: .venv/.installed

.venv/.installed: setup.py pyproject.toml constraints.txt
	@echo "Installing into .venv: PyTorch and what it needs, a few GB, one to a few minutes"
	@$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

bench: venv
	$(BIN)/python benchmarks/throughput.py --arch swin_l

resources: venv
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/resources.py

test: venv
	$(BIN)/python -m pytest

test-slow: venv
	$(BIN)/python -m pytest -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-gpu: venv
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# What takes long comes last: compiling the whole reference takes minutes, and a run that is cut short keeps what it has.
bench-gpu: venv
	@mkdir -p benchmarks/results/operators
	@failed=0; set -x; unset TRITON_INTERPRET; \
	$(BIN)/python benchmarks/operators.py --json benchmarks/results/operators/bfloat16.json || failed=1; \
	$(THROUGHPUT) --impl reference fast --json benchmarks/results/throughput_swin_l.json || failed=1; \
	$(THROUGHPUT) --json benchmarks/results/throughput_swin_l.json || failed=1; \
	exit $$failed

tune: venv
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/tune.py
