PYTHON ?= python3
BIN := .venv/bin
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

bench-gpu: venv
	$(BIN)/python benchmarks/throughput.py --arch swin_l --device cuda --json benchmarks/results/throughput_swin_l.json

tune: venv
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/tune.py
