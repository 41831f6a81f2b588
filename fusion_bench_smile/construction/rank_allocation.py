"""Allocation of ranks within a budget: after the router rows, direction by direction."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..exceptions import ConfigError


@dataclass(frozen=True)
class LayerSpectra:
    """The spectra of one layer's deltas, and the cost of their directions, in the unit of the budget."""

    name: str  # of the layer
    energies: tuple[tuple[float, ...], ...]  # of each expert's available directions: descending squared singular values
    gate_ranks: tuple[int, ...]  # the number of router rows of each expert
    shared_router: bool  # the router rows are directions; their right singular vectors cost nothing more
    up_cost: int  # of a left singular vector
    down_cost: int  # of a right singular vector, or a router row
    bias_cost: int = 0  # of the experts' biases

    def cost(self, expert: int, direction: int) -> int:
        """The cost of an expert's direction with this index."""
        is_router_row = self.shared_router and direction < self.gate_ranks[expert]
        return self.up_cost if is_router_row else self.up_cost + self.down_cost

    def min_rank(self, expert: int) -> int:
        """The least rank of an expert."""
        return min(self.gate_ranks[expert], len(self.energies[expert])) if self.shared_router else 0

    @property
    def min_cost(self) -> int:
        """The cost of router rows, least ranks and biases."""
        directions = sum(self.cost(e, j) for e in range(len(self.energies)) for j in range(self.min_rank(e)))
        return sum(self.gate_ranks) * self.down_cost + directions + self.bias_cost


def allocate(layers: Sequence[LayerSpectra], budget: int) -> list[list[int]]:
    """The rank of each expert in each layer, with a cost of at most `budget` in all.

    Every expert has its router rows, and at least as many directions. The rest buys further directions, those with the
    most energy sᵢⱼ² for their cost first. Raises ConfigError if the budget is too small for the router rows.
    """
    remaining = budget - sum(layer.min_cost for layer in layers)
    if remaining < 0:
        raise ConfigError(f"{-remaining:,} too many")
    ranks = [[layer.min_rank(expert) for expert in range(len(layer.energies))] for layer in layers]
    heap: list[tuple[float, int, int]] = []

    def push(i: int, expert: int) -> None:
        """Add an expert's next direction in layer i, if it has one. The smallest priority comes first."""
        layer, direction = layers[i], ranks[i][expert]
        if direction < len(layer.energies[expert]):
            gain = layer.energies[expert][direction] / layer.cost(expert, direction)
            heapq.heappush(heap, (-gain, i, expert))

    for i, layer_ranks in enumerate(ranks):
        for expert in range(len(layer_ranks)):
            push(i, expert)
    while heap:
        _, i, expert = heapq.heappop(heap)
        cost = layers[i].cost(expert, ranks[i][expert])
        if cost <= remaining:  # otherwise other directions may be cheaper
            remaining -= cost
            ranks[i][expert] += 1
            push(i, expert)
    return ranks


def summarize_ranks(layers: Sequence[LayerSpectra], ranks: Sequence[Sequence[int]]) -> dict[str, str]:
    """Last part of the layers' names → the range and mean of their ranks, as text."""
    by_type: dict[str, list[int]] = {}
    for layer, layer_ranks in zip(layers, ranks, strict=True):
        by_type.setdefault(layer.name.rpartition(".")[2], []).extend(layer_ranks)
    return {kind: f"{min(r)} to {max(r)}, mean {sum(r) / len(r):.1f}" for kind, r in by_type.items()}
