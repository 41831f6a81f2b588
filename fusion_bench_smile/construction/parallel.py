"""Parallel work: several items at a time on the CPU, each with its part of the threads, and items of many processes."""

import atexit
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..exceptions import PlanError

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


@cache
def destroy_process_group_at_exit() -> None:
    """Have this process leave the default group when it exits.

    The framework and, for gloo, Fabric leave that to the end of the interpreter, where a running thread of the group
    can abort a process that has done all its work.
    """
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


class WorkPartition:
    """The part of a list of work items that this process does: of the default group, `rank` among `size` processes.

    A single process, 0 among 1, does all.
    """

    def __init__(self, single_process: bool = True) -> None:
        in_group = not single_process and dist.is_available() and dist.is_initialized()
        if in_group:
            destroy_process_group_at_exit()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)

    def assign(self, costs: Sequence[float]) -> list[bool]:
        """Whether each item is done here: a contiguous run with about an equal part of the total cost."""
        total = sum(costs)
        centers = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
        return [min(int(self.size * center / total), self.size - 1) == self.rank for center in centers]

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def raise_together(self, error: Exception | None) -> None:
        """Raise in every process the error of any one: the others would wait for it forever.

        Raises PlanError if another process failed; the message is the one of its error.
        """
        for rank, message in enumerate(self.all_gather(None if error is None else str(error))):
            if error is not None and rank == self.rank:
                raise error
            if message is not None:
                raise PlanError(message)
