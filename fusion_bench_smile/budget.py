"""Ranks that fit a budget of parameters: which directions of which experts are worth their parameters.

Every layer and expert has its router rows, and at least as many directions; what is left of the budget buys further
directions, one at a time, and never more than there is. Imports torch alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

Allocation = Literal["uniform", "energy", "gain"]


@dataclass(frozen=True)
class LayerSpectra:
    """What the directions of one layer's experts cost, and what they are worth.

    Attributes:
        energies: for each expert the squared singular values of the directions it could have, in descending order.
        gate_ranks: for each expert its router rows.
        shared: the router rows are directions, whose right half is paid for already.
        weight_energy: ‖W₀‖².
        biases: parameters of the experts' biases.
        scales: parameters beside each stored row: 1 where it is stored as int8.
    """

    name: str
    in_features: int
    out_features: int
    energies: tuple[tuple[float, ...], ...]
    gate_ranks: tuple[int, ...]
    shared: bool
    weight_energy: float
    biases: int = 0
    scales: int = 0

    def cost(self, expert: int, direction: int) -> int:
        """Parameters of one more direction, which has this number (from 0)."""
        paid = self.shared and direction < self.gate_ranks[expert]
        left = self.out_features + self.scales
        return left if paid else left + self.in_features + self.scales

    def least(self, expert: int) -> int:
        """The rank that an expert has in any case."""
        return min(self.gate_ranks[expert], len(self.energies[expert])) if self.shared else 0

    @property
    def fixed(self) -> int:
        """Parameters that are needed in any case."""
        directions = sum(self.cost(e, j) for e in range(len(self.energies)) for j in range(self.least(e)))
        return sum(self.gate_ranks) * (self.in_features + self.scales) + directions + self.biases


def allocate(layers: Sequence[LayerSpectra], budget: int, how: Allocation) -> list[list[int]]:
    """For each layer, for each expert, its rank; with all that the experts add at most `budget` parameters.

    - ``"uniform"``: as nearly the same rank everywhere as the budget allows;
    - ``"energy"``: first the directions with the most energy sᵢⱼ² for a parameter;
    - ``"gain"``: the same, of energy relative to ‖W₀‖²: how much of what the layer does is changed.

    Raises:
        ConfigError: if the budget is too small for the router rows.
    """
    left = budget - sum(layer.fixed for layer in layers)
    if left < 0:
        raise ConfigError(f"{-left:,} parameters too many")
    ranks = [[layer.least(expert) for expert in range(len(layer.energies))] for layer in layers]
    queue = [_entry(layers, ranks, how, place, expert) for place, expert in _pairs(layers)]
    heap = [entry for entry in queue if entry is not None]
    heapq.heapify(heap)
    while heap:
        _, place, expert = heapq.heappop(heap)
        cost = layers[place].cost(expert, ranks[place][expert])
        if cost > left:
            continue  # there may be cheaper ones
        left -= cost
        ranks[place][expert] += 1
        further = _entry(layers, ranks, how, place, expert)
        if further is not None:
            heapq.heappush(heap, further)
    return ranks


def _pairs(layers: Sequence[LayerSpectra]) -> Iterator[tuple[int, int]]:
    return ((place, expert) for place, layer in enumerate(layers) for expert in range(len(layer.energies)))


def _entry(
    layers: Sequence[LayerSpectra], ranks: Sequence[Sequence[int]], how: Allocation, place: int, expert: int
) -> tuple[float, int, int] | None:
    """How soon an expert's next direction is bought, if it has one; the smallest comes first."""
    layer, direction = layers[place], ranks[place][expert]
    if direction >= len(layer.energies[expert]):
        return None
    if how == "uniform":
        return float(direction), place, expert
    worth = layer.energies[expert][direction] / layer.cost(expert, direction)
    return -worth / (layer.weight_energy if how == "gain" else 1.0), place, expert


def describe_ranks(layers: Sequence[LayerSpectra], ranks: Sequence[Sequence[int]]) -> dict[str, str]:
    """What was bought, for people: the last part of layers' names → the span and the mean of their ranks."""
    of_kinds: dict[str, list[int]] = {}
    for layer, of_layer in zip(layers, ranks, strict=True):
        of_kinds.setdefault(layer.name.rpartition(".")[2], []).extend(of_layer)
    return {kind: f"{min(r)} to {max(r)}, mean {sum(r) / len(r):.1f}" for kind, r in of_kinds.items()}
