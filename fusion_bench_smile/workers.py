"""Independent items of work on the CPU: several at a time, each with its part of the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def in_parallel(
    function: Callable[[T], R], items: Sequence[T], workers: int, one_at_a_time: bool = False
) -> Iterator[R]:
    """`function` of every item, in their order, without gradients.

    Small decompositions hardly gain from a second thread, so torch's threads are divided among the workers. That holds
    for the whole process, until the last result was taken.

    Args:
        one_at_a_time: leave all but one worker idle. Tiny items only wait for the interpreter's lock; their results
            are the same to the last bit, because each has as many threads as it would have beside others.
    """
    threads, work = torch.get_num_threads(), torch.no_grad()(function)
    pool = ThreadPoolExecutor(workers)
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield from (map if one_at_a_time else pool.map)(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
