"""Allocation of ranks within a budget of parameters: after the router rows, direction by direction."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Allocation
from ..exceptions import ConfigError


@dataclass(frozen=True)
class LayerSpectra:
    """The spectra of one layer's deltas, and the cost of their directions."""

    name: str  # of the layer
    in_features: int
    out_features: int
    energies: tuple[tuple[float, ...], ...]  # of each expert's available directions: descending squared singular values
    gate_ranks: tuple[int, ...]  # the number of router rows of each expert
    shared_router: bool  # the router rows are directions; their right singular vectors cost nothing more
    weight_energy: float  # ‖W₀‖²
    num_bias_parameters: int = 0  # parameters of the experts' biases
    scales_per_row: int = 0  # parameters beside each stored row: 1 for int8

    def cost(self, expert: int, direction: int) -> int:
        """Parameters of an expert's direction with this index."""
        left, right = self.out_features + self.scales_per_row, self.in_features + self.scales_per_row
        return left if self.shared_router and direction < self.gate_ranks[expert] else left + right

    def min_rank(self, expert: int) -> int:
        """The least rank of an expert."""
        return min(self.gate_ranks[expert], len(self.energies[expert])) if self.shared_router else 0

    @property
    def min_parameters(self) -> int:
        """Parameters of router rows, least ranks and biases."""
        directions = sum(self.cost(e, j) for e in range(len(self.energies)) for j in range(self.min_rank(e)))
        return sum(self.gate_ranks) * (self.in_features + self.scales_per_row) + directions + self.num_bias_parameters


def allocate(layers: Sequence[LayerSpectra], budget: int, allocation: Allocation) -> list[list[int]]:
    """The rank of each expert in each layer, with at most `budget` parameters in all.

    Every expert has its router rows, and at least as many directions. Raises ConfigError if the budget is too small for
    them. The rest buys further directions, one at a time:

    - ``"uniform"``: as nearly the same rank everywhere as the budget allows;
    - ``"energy"``: directions with the most energy sᵢⱼ² for a parameter first;
    - ``"gain"``: the same, with energies relative to ‖W₀‖², the relative change of the layer.
    """
    remaining = budget - sum(layer.min_parameters for layer in layers)
    if remaining < 0:
        raise ConfigError(f"{-remaining:,} parameters too many")
    ranks = [[layer.min_rank(expert) for expert in range(len(layer.energies))] for layer in layers]
    heap: list[tuple[float, int, int]] = []

    def push(i: int, expert: int) -> None:
        """Add an expert's next direction in layer i, if it has one. The smallest priority comes first."""
        layer, direction = layers[i], ranks[i][expert]
        if direction < len(layer.energies[expert]):
            gain = layer.energies[expert][direction] / layer.cost(expert, direction)
            relative_gain = gain / (layer.weight_energy if allocation == "gain" else 1.0)
            heapq.heappush(heap, (float(direction) if allocation == "uniform" else -relative_gain, i, expert))

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
