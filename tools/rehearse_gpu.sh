#!/bin/sh
# Rehearses a GPU run with vLLM's CUDA build of one version, without a GPU: rehearse_gpu.sh VERSION DIRECTORY
# Makes the environment in DIRECTORY (9 GB) if it is not there.
set -eu
version=$1 environment=$2
if [ ! -f "$environment/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    # PyPI's own builds: pip may be configured to prefer others, such as torch's for CPUs
    PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' PIP_EXTRA_INDEX_URL='' "$environment/bin/pip" install \
        --progress-bar off "vllm==$version" -e '.[gpu-test]'
    cc -shared -fPIC -w -o "$environment/libcuda.so.1" tests/rehearsal/libcuda_stub.c
    touch "$environment/.ready"
fi
export LD_LIBRARY_PATH="$environment:${LD_LIBRARY_PATH:-}" OMP_NUM_THREADS=1
"$environment/bin/python" -c "
import torch, triton
from importlib.metadata import version
assert torch.version.cuda, f'torch {torch.__version__} is no CUDA build'
assert version('vllm') == '$version', version('vllm')
print('vLLM', version('vllm'), 'torch', torch.__version__, 'Triton', triton.__version__)"
"$environment/bin/pytest" tests/rehearsal
"$environment/bin/pytest" --numprocesses 2 --dist loadfile tests/kernels/test_triton_checks.py \
    tests/kernels/test_triton_experts.py tests/kernels/test_triton_kernel_counts.py tests/kernels/test_triton_layout.py \
    tests/kernels/test_triton_pruning.py tests/kernels/test_triton_routing.py tests/kernels/test_triton_tiles.py
"$environment/bin/python" -m tests.kernels.triton_aot sm80 sm90 sm100 --ci
