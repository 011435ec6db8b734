"""Ranks that hold different tokens: each routes its own, and all compute everybody's. Below the engine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run_ranks(
    dp: int,
    tp: int,
    *,
    ep: bool,
    gathers: bool = True,
    all2all_backend: str = "allgather_reducescatter",
    kernels: str = "reference",
) -> list[dict]:
    """What each rank of parallel_rank.py prints, in order of rank. The Triton kernels are interpreted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"dp": dp, "tp": tp, "ep": ep, "port": port, "gathers": gathers, "all2all_backend": all2all_backend}
    environment = os.environ | {
        "VLLM_MCMOE_BACKEND": kernels,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_DIST_IDENT": f"mcmoe{port}",  # of the ranks' shared memory
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.vllm_mcmoe.parallel_rank", json.dumps({"rank": rank, **common})],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(dp * tp)
    ]
    try:
        printed = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    results = []
    for out, errors in printed:
        lines = [line.removeprefix("result ") for line in out.splitlines() if line.startswith("result ")]
        assert lines, errors[-4000:]
        results.append(json.loads(lines[0]))
    return results


@pytest.mark.parametrize(
    ("dp", "tp", "ep", "kernels", "local_experts"),
    [(2, 1, False, "reference", 4), (2, 1, True, "triton", 2), (2, 2, True, "reference", 1)],
    ids=["experts sliced", "experts shared out", "tensor parallel ranks share the sequence"],
)
def test_every_rank_gets_the_sums_of_its_own_tokens(dp, tp, ep, kernels, local_experts):
    for result in run_ranks(dp, tp, ep=ep, kernels=kernels):
        assert result["local_experts"] == local_experts
        assert result["shares_sequence"] == (tp > 1)
        # vLLM masks padding by this rank's tokens while it routes: it must not be given the others'
        assert result["routed"] == [result["tokens"]]
        # float32 sums over ranks in another order, and int8 codes of an intermediate that lies on an edge
        assert result["difference"] < 1e-5


def test_a_platform_that_cannot_gather_is_refused():
    """vLLM's CPU build, where no mixture of experts can be data parallel."""
    for result in run_ranks(2, 1, ep=True, gathers=False):
        assert "vLLM cannot gather the tokens of data parallel ranks on this platform" in result["refused"]
        assert "Start one server per replica" in result["refused"]
