"""Independent items of work on the CPU: several at a time, each with its part of the threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# what all items in work may take together
IN_FLIGHT_BYTES = 2**29


def workers_for(bytes_each: int) -> int:
    """How many items of this size are worked on at a time.

    It does not depend on how many items there are: the threads that one item gets decide how its sums are rounded, and
    processes that share the items must agree to the last bit.
    """
    return max(1, min(torch.get_num_threads(), IN_FLIGHT_BYTES // max(bytes_each, 1)))


def in_parallel(begin: Callable[[T], Future[R] | Callable[[], R]], items: Iterable[T], workers: int) -> Iterator[R]:
    """The result of every item, in their order, without gradients.

    Small decompositions hardly gain from a second thread, so torch's threads are divided among the workers. That holds
    for the whole process, until the last result was taken.

    Args:
        begin: gives a function that makes an item's result, for one of the workers; or, as `done`, the result. What
            takes but a moment is better done at once: threads with little to do wait for the interpreter's lock.
    """
    threads, waiting = torch.get_num_threads(), deque[Future[R]]()
    pool = ThreadPoolExecutor(workers)
    torch.set_num_threads(max(1, threads // workers))
    try:
        for item in items:
            with torch.no_grad():
                begun = begin(item)
            waiting.append(begun if isinstance(begun, Future) else pool.submit(torch.no_grad()(begun)))
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def done(result: R) -> Future[R]:
    """A result that is there already."""
    future: Future[R] = Future()
    future.set_result(result)
    return future
