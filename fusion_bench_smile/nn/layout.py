"""The layout of a routed layer: the ranks that each expert has in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

DENSE = -1


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of one layer are stored. T is the number of experts."""

    ranks: tuple[int, ...]  # of each expert; 0 for an unchanged weight, −1 (`DENSE`) for a dense delta
    gate_ranks: tuple[int, ...]  # the number of router rows of each expert; 0 gives the expert a score of 0
    shared_router: bool = True  # the router rows are the leading directions of the experts, not stored in addition
    expert_bias: bool = False  # at least one expert changed the bias

    @property
    def num_experts(self) -> int:
        """T."""
        return len(self.ranks)

    @cached_property
    def low_ranks(self) -> tuple[int, ...]:
        """The number of `up` rows of each expert."""
        return tuple(max(rank, 0) for rank in self.ranks)

    @cached_property
    def shared_ranks(self) -> tuple[int, ...]:
        """The number of directions of each expert that are router rows."""
        if not self.shared_router:
            return (0,) * self.num_experts
        return tuple(min(k, g) for k, g in zip(self.low_ranks, self.gate_ranks, strict=True))

    @cached_property
    def down_ranks(self) -> tuple[int, ...]:
        """The number of `down` rows of each expert: its directions that are not router rows."""
        return tuple(k - s for k, s in zip(self.low_ranks, self.shared_ranks, strict=True))

    @cached_property
    def dense_ranks(self) -> tuple[int, ...]:
        """The number of `dense` entries of each expert: 1 or 0."""
        return tuple(int(rank == DENSE) for rank in self.ranks)

    @property
    def dense_experts(self) -> tuple[int, ...]:
        """The indices of the experts with a dense delta."""
        return tuple(index for index, rank in enumerate(self.ranks) if rank == DENSE)

    @cached_property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → the number of rows of each expert in it."""
        return {"gate": self.gate_ranks, "down": self.down_ranks, "up": self.low_ranks, "dense": self.dense_ranks}


def is_uniform(sizes: Sequence[int]) -> bool:
    """Whether all sizes are equal."""
    return len(set(sizes)) == 1
