"""Distributed construction: each process factors its part of the (expert, layer) pairs, then all exchange them."""

import atexit
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch.distributed as dist

from ..exceptions import PlanError


@cache
def destroy_process_group_at_exit() -> None:
    """Have this process leave the default group when it exits.

    The framework and, for gloo, Fabric leave that to the end of the interpreter, where a running thread of the group
    can abort a process that has done all its work.
    """
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


class WorkPartition:
    """The part of a list of work items that this process does, of the default group; a single process does all.

    Attributes:
        rank: The rank of this process; 0 for a single process.
        size: The number of processes.
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

        Raises:
            PlanError: Another process failed; the message is the one of its error.
        """
        for rank, message in enumerate(self.all_gather(None if error is None else str(error))):
            if error is not None and rank == self.rank:
                raise error
            if message is not None:
                raise PlanError(message)
