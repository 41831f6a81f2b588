"""Where fine-tuning happens: the task vectors in the singular subspaces of W₀ (arXiv 2408.10174, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Literal, cast

import pandas as pd
import torch
from torch import Tensor, nn

from ..factors import truncated_svd
from ..kin import routed_class
from ..sources import Openable
from .deltas import layer_deltas

Zone = Literal["I", "II", "II+III"]
ZONES: tuple[Zone, ...] = ("I", "II", "II+III")


class Zones:
    """The zones of one weight matrix W₀ (m, n) with the thin SVD U S Vᵀ.

    With k the number of leading singular values that make up half of their sum, zone I is spanned by the first k
    columns of U and V, zone II by the others, and II+III by everything orthogonal to the first k. No square U or V is
    formed: what is orthogonal to the first k is the rest of the whole, or of the column space of W₀.

    Attributes:
        k: the rank of zone I.
    """

    def __init__(self, weight: Tensor) -> None:
        values = torch.linalg.svdvals(weight)
        sums = values.cumsum(0)
        self.k = int((sums < 0.5 * sums[-1]).sum()) + 1
        leading = truncated_svd(weight, self.k)
        self._left, self._right = torch.linalg.qr(leading.up).Q, leading.down.mT  # (m, k), (n, k)
        rows, columns = weight.shape
        self._columns = torch.linalg.qr(weight).Q if rows > columns else None  # of the column space, (m, n)
        self._rows = torch.linalg.qr(weight.mT).Q if columns > rows else None

    def part(self, delta: Tensor, zone: Zone) -> Tensor:
        """What of a delta (m, n) lies in a zone."""
        if zone == "I":
            return self._left @ (self._left.mT @ delta @ self._right) @ self._right.mT
        rest = delta - self._left @ (self._left.mT @ delta)
        rest = rest - (rest @ self._right) @ self._right.mT
        if zone == "II" and self._columns is not None:
            return self._columns @ (self._columns.mT @ rest)
        if zone == "II" and self._rows is not None:
            return (rest @ self._rows) @ self._rows.mT
        return rest

    def shares(self, delta: Tensor) -> dict[str, float]:
        """The share of ‖ΔW‖² in each zone; NaN for a delta of zero."""
        total = _energy(delta)
        left, both = self._left.mT @ delta, self._left.mT @ delta @ self._right
        inner = _energy(both)
        outer = total - _energy(left) - _energy(delta @ self._right) + inner
        second = outer
        if self._columns is not None:
            within = self._columns.mT @ delta
            second = _energy(within) - _energy(left) - _energy(within @ self._right) + inner
        elif self._rows is not None:
            within = delta @ self._rows
            second = _energy(within) - _energy(self._left.mT @ within) - _energy(delta @ self._right) + inner
        return {zone: float(part / total) for zone, part in zip(ZONES, (inner, second, outer), strict=True)}

    def of_random(self) -> dict[str, float]:
        """The shares that are expected of a random matrix: the product of the zone's parts of both sides."""
        rows, columns = self._left.shape[0], self._right.shape[0]
        k, rank = self.k, min(self._left.shape[0], self._right.shape[0])
        sizes = (k * k, (rank - k) ** 2, (rows - k) * (columns - k))
        return {zone: size / (rows * columns) for zone, size in zip(ZONES, sizes, strict=True)}


@torch.no_grad()
def subspace_energy(pretrained: nn.Module, experts: Mapping[str, Openable]) -> pd.DataFrame:
    """The share of each task vector's energy ‖ΔW‖² in the zones of W₀.

    Returns:
        One row for each layer and expert: ``layer``, ``type``, ``expert``, ``k`` (rank of zone I), and the shares
        ``I``, ``II``, ``II+III``, from 0 to 1; NaN where an expert left the layer as it is; ``random I``, … are what is
        expected of a random matrix.

    Raises:
        PlanError: for models that can't be upscaled together.
    """
    rows = []
    for layer in layer_deltas(pretrained, experts):
        zones = Zones(layer.weight)
        for expert, delta in layer.experts.items():
            named = {"layer": layer.name, "type": layer.type, "expert": expert, "k": zones.k}
            of_random = {f"random {zone}": share for zone, share in zones.of_random().items()}
            rows.append(named | zones.shares(delta) | of_random)
    return pd.DataFrame(rows)


@torch.no_grad()
def projected(pretrained: nn.Module, expert: nn.Module, zone: Zone) -> nn.Module:
    """A copy of an expert of whose task vectors only the part in one zone is kept; all else is the expert's."""
    copy = deepcopy(expert)
    for layer in layer_deltas(pretrained, {"expert": expert}):
        module = copy.get_submodule(layer.name)
        matrix = routed_class(module).matrix(cast(Tensor, module.weight))  # a view
        matrix.copy_(layer.weight + Zones(layer.weight).part(layer.experts["expert"], zone))
    return copy


def _energy(matrix: Tensor) -> Tensor:
    return matrix.double().square().sum()
