# Everyday commands; `make` lists them. Set-up goes into .libtorch, .cuda and target, nowhere else.

# The pinned pair: Cargo.lock holds tch 0.24, whose libtorch is the one in the PyTorch 2.11 wheel.
TORCH := 2.11.0
CUDA_TOOLKIT := 13.0.2

# Length of the demo's training; 0 steps means the default of the demo. CI sets both.
DEMO_STEPS ?= 0
DEMO_SEQLEN ?= 16384
BENCH ?= --device cpu --seqlen 16384 --heads 4 --head-dim 64 --dtype f32 --moba 512x3 --summary

# Where python3 finds torch: beside the user's own libtorch, else in .libtorch.
ifneq ($(LIBTORCH_USE_PYTORCH),)
python_path := $(PYTHONPATH)
else ifneq ($(LIBTORCH),)
python_path := $(abspath $(LIBTORCH)/..):$(PYTHONPATH)
else
python_path := $(CURDIR)/.libtorch:$(PYTHONPATH)
endif

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-14s %s\n", $$1, $$2 }'

.PHONY: libtorch
libtorch: ## put libtorch (the PyTorch wheel, 5 GB) into .libtorch; skipped if LIBTORCH or LIBTORCH_USE_PYTORCH is set
ifneq ($(LIBTORCH)$(LIBTORCH_USE_PYTORCH),)
	@echo "libtorch: using yours ($(if $(LIBTORCH_USE_PYTORCH),that of python3,$(LIBTORCH))), nothing to install"
else
	@scripts/wheels .libtorch torch==$(TORCH) numpy pytest
endif

.PHONY: cuda-toolkit
cuda-toolkit: ## put nvcc (271 MB) into .cuda, for `--features cuda` on a machine without the CUDA toolkit
	@scripts/wheels .cuda 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==$(CUDA_TOOLKIT)'

.PHONY: tools
tools:
	@scripts/need cargo g++ python3

.PHONY: test
test: tools libtorch ## unit tests, suite, doc tests, then the operator from Python
	@PYTHONPATH="$(python_path)" scripts/need torch pytest
	@echo "test: Rust"
	cargo test --release
	@echo "test: Python"
	cargo build --release --example moba_ops
	PYTHONPATH="$(python_path)" TORCHINDUCTOR_CACHE_DIR="$(CURDIR)/target/inductor" \
	  python3 -m pytest -q -p no:cacheprovider --basetemp target/pytest tests/python

.PHONY: format
format: ## cargo fmt, and clang-format (from PyPI, into target) for csrc
	@scripts/format

.PHONY: demo
demo: tools libtorch ## train a language model with MoBA, export it, compare MoBA with full attention
	@DEMO_STEPS=$(DEMO_STEPS) DEMO_SEQLEN=$(DEMO_SEQLEN) PYTHONPATH="$(python_path)" scripts/demo

.PHONY: bench
bench: tools libtorch ## MoBA against full attention on the CPU; BENCH="..." sets the arguments of bench_attention
	cargo run --release --example bench_attention -- $(BENCH)

.PHONY: scaling
scaling: tools libtorch ## loss against compute, MoBA beside full attention: a miniature of docs/scaling.md on the CPU
	@scripts/scaling

.PHONY: corpus
corpus: tools libtorch ## the text of docs/scaling.md (from Debian) and its tokens: target/corpus
	@scripts/corpus target/corpus
	@echo "corpus: tokens (building scaling_laws takes minutes the first time)"
	@cargo run --quiet --release --example scaling_laws -- corpus --data target/corpus/text --vocab 4096 \
	  --out target/corpus/corpus.safetensors
	@scripts/pack target/corpus/corpus.safetensors

.PHONY: gpu-bundle
gpu-bundle: tools libtorch ## suite, benches and examples for a GPU machine that has PyTorch and no Rust: target/gpu-bundle
	@scripts/gpu-bundle
