"""Independent pieces of work side by side.

torch shares out the work of one operation among its threads, which pays only where matrices are large. Several pieces
at once, each on threads of its own, keep all of them busy whatever the sizes. Which thread works on what does not
change a bit of the result.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(task: Callable[[Item], Result], items: Sequence[Item], at_once: int | None = None) -> list[Result]:
    """task(item) of each, in their order.

    at_once: the most that may run at the same time; of torch's threads each has an even share. None: as many as there
    are threads. One alone runs in the calling thread. torch keeps modes like no_grad by thread: a task sets its own.

    The first exception is raised when what has begun is over; the rest is not begun.
    """
    threads = torch.get_num_threads()
    workers = _even_share(threads, min(threads if at_once is None else at_once, len(items)))
    if workers <= 1:
        return [task(item) for item in items]
    share = threads // workers
    try:
        with ThreadPoolExecutor(workers, initializer=_take, initargs=(share,)) as pool:
            return list(pool.map(task, items))
    finally:
        torch.set_num_threads(threads)  # what a thread sets, others that have not begun take over


def _even_share(threads: int, most: int) -> int:
    """The largest number up to `most` that threads can be divided by: none is to be left idle."""
    return max((count for count in range(1, most + 1) if threads % count == 0), default=1)


def _take(threads: int) -> None:
    """Give the calling thread so many of torch's."""
    torch.get_num_threads()  # a thread's first call takes over what was set last, by whichever thread
    torch.set_num_threads(threads)
