# Each target does all set-up in .venv from pinned constraints, the first time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# glibc keeps freed memory: CPU training is up to twice as fast without the page faults.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 17179869184
export MALLOC_TOP_PAD_ = 268435456
export TOKENIZERS_PARALLELISM = false

.PHONY: demo demo-real test test-real quick check docs lab bench bench-gpu clean

demo: $(READY)
	$(BIN)/forgetless demo

# The demo on a real chat model, which `make lab` prepares: some 15 minutes on two cores.
demo-real: lab/smollm2/model.safetensors
	$(BIN)/forgetless demo lab/smollm2 --dtype float32 --out forgetless-demo-real

# Two processes of one thread each: tiny models gain nothing from more threads, and where cores are
# shared threads wait for each other. A process needs about a GiB. They take files of tests in the
# order of tests/conftest.py, the longest first.
JOBS ?= 2
test: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What needs the real model of `make lab`; some minutes.
test-real: lab/smollm2/model.safetensors
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m real

# The inner loop, in less than 90 seconds: form, options, importance files and the pull, without the
# tests that train end to end.
QUICK := $(addprefix tests/test_,$(addsuffix .py,form imports contributing schema terminal cli \
	codec tiers storage inspection consolidation layers weights moved frontier \
	penalty tiled forms numerics shrink))

quick: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -x $(QUICK)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# A real chat model of 135M parameters for experiments and for tests marked `real`; an ignored folder.
lab: lab/smollm2/model.safetensors
lab/smollm2/model.safetensors: $(READY)
	$(BIN)/python -m pip install --quiet --target lab/packages --no-deps gguf
	PYTHONPATH=lab/packages $(BIN)/python ../shared/models/smollm2.py lab/smollm2

bench bench-gpu: $(READY)
	$(BENCH) benchmarks/pull.py $(PULL)
	$(BENCH) benchmarks/tuning.py
	$(BENCH) benchmarks/recording.py
	$(BENCH) benchmarks/tracking.py
	$(BENCH) benchmarks/sizes.py
	$(BENCH) benchmarks/table.py

# One thread: on cores that are shared, waiting for the other thread is all one would measure.
bench: BENCH = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python
bench-gpu: BENCH = $(BIN)/python
bench-gpu: PULL = --gpu

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
