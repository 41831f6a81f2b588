"""Several processes build one model: each factors its share of the (expert, layer) pairs, then all exchange them."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch.distributed as dist

from .errors import PlanError


@cache
def leave_at_exit() -> None:
    """Have this process leave the default group when it exits.

    The framework and, for gloo, Fabric leave that to the interpreter's end, where a thread of the group that still
    runs can abort a process that has done all its work.
    """
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


class Share:
    """What this process does of the work that all processes of the default group share.

    Args:
        alone: do everything here, whether there are other processes or not.
    """

    def __init__(self, alone: bool = True) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        if together:
            leave_at_exit()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def takes(self, costs: Sequence[float]) -> list[bool]:
        """Which of a list of items are this process's own: a contiguous run of about an equal part of the cost."""
        total = sum(costs)
        middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
        return [min(int(self.size * middle / total), self.size - 1) == self.rank for middle in middles]

    def exchange(self, mine: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def agree(self, error: Exception | None) -> None:
        """Raise in every process what went wrong in one of them: the others would wait for it forever."""
        for rank, message in enumerate(self.exchange(None if error is None else str(error))):
            if error is not None and rank == self.rank:
                raise error
            if message is not None:
                raise PlanError(message)
