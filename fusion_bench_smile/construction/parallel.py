"""Independent work items on the CPU: several at a time, each with its part of the threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MAX_BYTES_IN_FLIGHT = 2**29  # of all items in progress


def num_workers(bytes_per_item: int) -> int:
    """The number of items of this size in progress at a time.

    It does not depend on the number of items: the threads of an item determine how its sums are rounded, and processes
    that divide the items must agree to the last bit.
    """
    return max(1, min(torch.get_num_threads(), MAX_BYTES_IN_FLIGHT // max(bytes_per_item, 1)))


def map_in_parallel(begin: Callable[[T], Future[R] | Callable[[], R]], items: Iterable[T], workers: int) -> Iterator[R]:
    """The result of every item, in order, without gradients; `workers` items are in progress at a time.

    Small decompositions gain little from a second thread, so torch's threads are divided among the workers, for the
    whole process and until the last result was taken. `begin` returns a function that computes the result of an item,
    which a worker calls, or `completed` with the result. Short work is better done in `begin`: threads with little to
    do wait for the interpreter's lock.
    """
    threads, pending = torch.get_num_threads(), deque[Future[R]]()
    pool = ThreadPoolExecutor(workers)
    torch.set_num_threads(max(1, threads // workers))
    try:
        for item in items:
            with torch.no_grad():
                begun = begin(item)
            pending.append(begun if isinstance(begun, Future) else pool.submit(torch.no_grad()(begun)))
            while pending and pending[0].done():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def completed(result: R) -> Future[R]:
    """A future with a result."""
    future: Future[R] = Future()
    future.set_result(result)
    return future
