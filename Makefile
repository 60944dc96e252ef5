PYTHON ?= python3
BIN := .venv/bin
# The commit that results are kept under where there is no .git: COMMIT=... with any target.
export COMMIT
.PHONY: venv demo bench tables resources test test-slow lint test-gpu bench-cpu bench-data bench-gpu bench-gpu-models bench-gpu-compiled bench-gpu-fit tune

venv: .venv/.installed

.venv/.installed: setup.py pyproject.toml constraints.txt
	@echo "Installing into .venv: PyTorch and what it needs, a few GB, one to a few minutes"
	@$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Synthetic clips, a small model trained on them, its test, and a prediction with pictures, all below demo/. It goes on where it was
# stopped.
# Products this small take longer in several threads than in one.
demo: export OMP_NUM_THREADS = 1
demo: venv
	$(BIN)/stgcma-fast data synth --task ave --out demo/clips --clips 500
	$(BIN)/stgcma-fast fit --config configs/demo.yaml
	$(BIN)/stgcma-fast test --config configs/demo.yaml
	$(BIN)/stgcma-fast predict --checkpoint demo/run --out demo/predictions demo/clips/AVE/synth000004.mp4
	@echo "Look at demo/run/curves.png and demo/predictions/synth000004/timeline.png"

bench: venv
	$(BIN)/python benchmarks/throughput.py --arch swin_l

tables: venv
	$(BIN)/python benchmarks/tables.py

resources: venv
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/resources.py

# One process per core, each with one thread of PyTorch's (tests/conftest.py).
PARALLEL = -n auto --dist worksteal

test: venv
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: venv
	$(BIN)/python -m pytest -m slow $(PARALLEL)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Four processes share the GPU, for every kernel is compiled on the CPU first.
test-gpu: venv
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu -n 4 --dist worksteal

# Every part of a benchmark keeps its results as it ends, and what fails or takes too long does not stop the next.
BEGIN = failed=0; set -x; unset TRITON_INTERPRET;
END = || failed=1;
THROUGHPUT = $(BIN)/python benchmarks/throughput.py --arch

bench-cpu: venv
	@$(BEGIN) \
	$(foreach arch,swin_l clip_b16,$(THROUGHPUT) $(arch) --dtype float32 bfloat16 --steps 5 --device cpu --json auto $(END)) \
	exit $$failed

bench-data: venv
	$(BIN)/python benchmarks/data.py --task ave --arch swin_l --json auto

# A GPU may be lent for ten minutes at a time: each target fits into that by the limits of its parts, in seconds. What matters most
# comes first, and what is compiled, which takes minutes, last.
RACE = --impl reference fast fast_graph $(1) --device cuda --json auto $(END)
COMPILED = --impl compiled $(1) --device cuda --json auto $(END)
OPERATORS = $(BIN)/python -m pytest benchmarks/ops $(foreach provider,$(1),--provider $(provider)) --device cuda --json auto $(END)
UNCOMPILED = reference fast flash_attn xformers sdpa_flash sdpa_cudnn sdpa_efficient sdpa_math

bench-gpu: venv
	@$(BEGIN) \
	timeout 120 $(THROUGHPUT) swin_l --batch-size 1 $(RACE) \
	timeout 90 $(THROUGHPUT) swin_l --batch-size 8 $(call RACE,--steps 20) \
	timeout 160 $(call OPERATORS,$(UNCOMPILED)) \
	timeout 50 $(BIN)/python benchmarks/profile.py --arch swin_l --phase train --device cuda --json auto $(END) \
	timeout 170 $(THROUGHPUT) swin_l --batch-size 1 $(COMPILED) \
	exit $$failed

bench-gpu-models: venv
	@$(BEGIN) \
	$(foreach arch,clip_l14 swin_b clip_b16,$(foreach batch,1 8,timeout 75 $(THROUGHPUT) $(arch) --batch-size $(batch) $(RACE))) \
	timeout 140 $(BIN)/python benchmarks/scaling.py --arch swin_l --seconds 110 --device cuda --json auto $(END) \
	exit $$failed

bench-gpu-compiled: venv
	@$(BEGIN) \
	timeout 100 $(THROUGHPUT) swin_l --batch-size 8 $(call COMPILED,--steps 20) \
	timeout 100 $(call OPERATORS,reference compiled fast) \
	$(foreach arch,clip_l14 swin_b clip_b16,$(foreach batch,1 8,timeout 65 $(THROUGHPUT) $(arch) --batch-size $(batch) $(COMPILED))) \
	exit $$failed

bench-gpu-fit: venv
	@$(BEGIN) \
	$(foreach batch,1 8,timeout 290 $(BIN)/python benchmarks/fit.py --arch swin_l --batch-size $(batch) --device cuda --json auto $(END)) \
	exit $$failed

tune: venv
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/tune.py
