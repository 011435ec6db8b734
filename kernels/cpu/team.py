"""How the threads of a call share its work.

Work is cut into tasks that threads take from a shared counter. Every output element is computed by one thread in an
order that depends on neither the number of threads nor the rest of the batch, so results are the same bits in any
setting.
"""

from numba import njit

from vllm_mcmoe.kernels.cpu.intrinsics import call_parallel, call_worker, fetch_add, load_acquire, pause, yield_core

SPINS = 2000  # about 50 us of waiting awake, longer than a task of decoding; then the core is offered to others


@njit
def run_team(parallel, worker, data, threads):
    """worker(data) on so many threads; parallel: address of GOMP_parallel."""
    if threads == 1:
        call_worker(worker, data)
    else:
        call_parallel(parallel, worker, data, threads)


@njit
def finish_phase(finished, own_tasks, all_tasks):
    """Report this thread's tasks to the counter at `finished`, then wait until all are done.

    Waiting for tasks rather than for threads lets a team go on while a thread of it has not been given a core yet.
    """
    fetch_add(finished, own_tasks)
    spins = 0
    while load_acquire(finished) < all_tasks:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            yield_core()
