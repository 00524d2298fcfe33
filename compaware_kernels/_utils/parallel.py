"""Work on many items of different cost over the threads of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch

from .progress import tracked

__all__ = ["in_parallel"]

T, R = TypeVar("T"), TypeVar("R")


def in_parallel(
    work: Callable[[T], R], items: Sequence[T], cost: Callable[[T], float], what: str, shown: bool | None = None
) -> list[R]:
    """``work`` of every item, in order: costly items one by one on all threads, the others side by side on one each.

    An item is costly if it is more than a thread's share of the whole. The workers do not inherit torch's modes of
    this thread, such as ``no_grad``. The first error is raised after the work that has begun.

    Args:
        cost: of an item, in any unit.
        what, shown: as of :func:`.progress.tracked`.
    """
    threads = torch.get_num_threads()
    share = sum(map(cost, items)) / threads
    order = sorted(range(len(items)), key=lambda i: -cost(items[i]))
    jobs: list[Callable[[], R]] = [partial(work, items[i]) for i in order]
    alone = len(items) if threads == 1 else sum(cost(items[i]) > share for i in order)
    found: dict[int, R] = {}
    futures = []
    try:
        for place, i in enumerate(tracked(order, what, shown)):
            if place == alone:
                futures = [_workers(threads).submit(job) for job in jobs[alone:]]
            found[i] = jobs[place]() if place < alone else futures[place - alone].result()
    finally:
        for future in futures:
            future.cancel()
        if futures:
            torch.set_num_threads(threads)  # the workers' set_num_threads(1) would become the default of new threads
    return [found[i] for i in range(len(items))]


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Pool of single-threaded workers, cached: a new worker would allocate the buffers of every library again."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
