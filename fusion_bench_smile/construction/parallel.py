"""Parallel work: several items at a time on the CPU, each with its part of the threads, and items of many processes."""

from __future__ import annotations

import atexit
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..exceptions import PlanError, SmileError

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


@cache
def _control_group(world: Any) -> Any:
    """The group for values and errors: the default group if it is gloo's, otherwise one beside it."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


class _MissingProcessError(PlanError):
    """Another process has ended, so that there is nobody to tell of it."""


class WorkPartition:
    """The part of a list of work items that this process does: of the default group, `rank` among `size` processes.

    A single process, 0 among 1, does all. Used as a context manager, a partition tells all processes of an error in any
    of them: the others raise it in their next exchange, at the latest at the end of the ``with`` block. All processes
    must make the same calls of `all_gather`. Values are pickled: the processes of a group trust each other.
    """

    def __init__(self, single_process: bool = True) -> None:
        in_group = not single_process and dist.is_available() and dist.is_initialized()
        if in_group:
            destroy_process_group_at_exit()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
        self._ended = self.size == 1  # there are no other processes, or all know of an error

    def __enter__(self) -> WorkPartition:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Exchange errors for the last time. Raises as `all_gather`, if this process has none of its own."""
        if not self._ended and not isinstance(error, _MissingProcessError):
            self._exchange(None, error)

    def assign(self, costs: Sequence[float]) -> list[bool]:
        """Whether each item is done here: a contiguous run with about an equal part of the total cost."""
        total = sum(costs)
        centers = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
        return [min(int(self.size * center / total), self.size - 1) == self.rank for center in centers]

    def all_gather(self, value: T) -> list[T]:
        """The value of every process, by rank.

        Raises PlanError if another process failed, with the message of its error, or if one does not answer.
        """
        return [value] if self.size == 1 else self._exchange(value, None)

    def _exchange(self, value: Any, error: BaseException | None) -> list[Any]:
        outcomes: list[Any] = [None] * self.size
        try:
            group = _control_group(dist.group.WORLD)
            dist.monitored_barrier(group, _timeout(group), wait_all_ranks=True)
            dist.all_gather_object(outcomes, (error and _describe(error, self.rank), value), group)
        except RuntimeError as problem:
            self._ended = True
            if error is None:
                raise _MissingProcessError(_missing_process(problem, self.rank)) from problem
            return outcomes  # the own error goes on
        failures = [message for message, _ in outcomes if message is not None]
        self._ended = bool(failures) or error is not None
        if failures and error is None:
            raise PlanError(failures[0])
        return [value for _, value in outcomes]


def _describe(error: BaseException, rank: int) -> str:
    """An error for the other processes: the message of a `SmileError`, which needs no more, or type and message."""
    name = type(error).__name__
    return str(error) if isinstance(error, SmileError) else f"process {rank} failed: {name}: {error}".rstrip(" :")


def _missing_process(problem: RuntimeError, rank: int) -> str:
    """The message for an exchange that failed. torch names the missing processes in that of process 0."""
    ranks = re.findall(r"[Rr]anks?:? ([\d, ]+) (?:failed|timed)|failed to .*? ([\d, ]+)", str(problem))
    named = next((" ".join(found).strip(" ,") for found in ranks), "")
    who = f"process {named}" if named else ("another process" if rank == 0 else "process 0, or one that it waits for,")
    return f"{who} has ended or does not answer: see its output, and start all processes again"


def _timeout(group: Any) -> Any:
    """The time that the group waits for its processes; None for torch's default of 30 minutes."""
    try:
        return group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):
        return None
