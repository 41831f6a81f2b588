"""Task vectors of all experts, and their energy in the singular subspaces of W₀ (arXiv 2408.10174, section 3)."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, cast

import pandas as pd
import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..construction import load_expert, make_plan, open_experts, split_targeted_attention, truncated_svd
from ..io import ExpertSource, StateDictSource, stored_names
from ..nn import routed_type_of, split_attention

Zone = Literal["I", "II", "II+III"]
ZONES: tuple[Zone, ...] = ("I", "II", "II+III")


@dataclass(frozen=True)
class LayerDeltas:
    """The deltas of one layer."""

    name: str  # in the pretrained model
    weight: Tensor  # W₀ (out, in), at least float32
    experts: dict[str, Tensor]  # expert → ΔW (out, in), in the dtype of the weight

    @property
    def type(self) -> str:
        """The last part of the name, e.g. ``fc1``."""
        return self.name.rsplit(".", 1)[-1]


@torch.no_grad()
def layer_deltas(pretrained: nn.Module, experts: Mapping[str, ExpertSource]) -> Iterator[LayerDeltas]:
    """The deltas of every layer that `upscale` upscales.

    Experts in folders are read tensor by tensor; an expert given by a function is loaded once and kept in memory.
    Raises PlanError if the models cannot be upscaled together; see `upscale`.
    """
    config = SmileConfig(k=1, gate_k=1)
    pretrained = split_targeted_attention(pretrained, config)
    plan = make_plan(pretrained, len(experts), config)
    base, aliases = StateDictSource(pretrained.state_dict()), stored_names(pretrained)
    sources = {
        name: source or load_expert(plan, name, experts[name], base, aliases)
        for name, source in open_experts(plan, experts, base, aliases).items()
    }
    for layer in plan.layers:
        matrix, key = routed_type_of(pretrained.get_submodule(layer.name)).weight_matrix, f"{layer.name}.weight"
        stored = base.read(key)
        weight = matrix(stored.to(torch.promote_types(stored.dtype, torch.float32)))
        tuned = {name: matrix(source.read(key)).to(weight) for name, source in sources.items()}
        yield LayerDeltas(layer.name, weight, {name: expert - weight for name, expert in tuned.items()})


class Zones:
    """The zones of one weight matrix W₀ (m, n) with the thin SVD U S Vᵀ.

    With k the number of leading singular values that make up half of their sum, zone I is spanned by the first k
    columns of U and V, zone II by their other columns, and zone II+III by the orthogonal complements of the first k
    columns. No square U or V is formed: projections on complements are differences.
    """

    def __init__(self, weight: Tensor) -> None:
        sums = torch.linalg.svdvals(weight).cumsum(0)
        self.k = int((sums < 0.5 * sums[-1]).sum()) + 1  # rank of zone I
        leading = truncated_svd(weight, self.k)
        self._left, self._right = torch.linalg.qr(leading.up).Q, leading.down.mT  # (m, k), (n, k)
        rows, columns = weight.shape
        self._column_space = torch.linalg.qr(weight).Q if rows > columns else None  # (m, n), orthonormal columns
        self._row_space = torch.linalg.qr(weight.mT).Q if columns > rows else None  # (n, m), orthonormal columns

    def project(self, delta: Tensor, zone: Zone) -> Tensor:
        """Project a delta (m, n) onto a zone: (m, n)."""
        if zone == "I":
            return self._left @ (self._left.mT @ delta @ self._right) @ self._right.mT
        complement = delta - self._left @ (self._left.mT @ delta)
        complement = complement - (complement @ self._right) @ self._right.mT
        if zone == "II" and self._column_space is not None:
            return self._column_space @ (self._column_space.mT @ complement)
        if zone == "II" and self._row_space is not None:
            return (complement @ self._row_space) @ self._row_space.mT
        return complement

    def energy_shares(self, delta: Tensor) -> dict[str, float]:
        """The share of the energy ‖ΔW‖² of a delta (m, n) in each zone, from 0 to 1; NaN for a delta of zero."""
        left, right = self._left.mT @ delta, delta @ self._right
        first, total = _energy(left @ self._right), _energy(delta)
        second = complement = total - _energy(left) - _energy(right) + first
        if self._column_space is not None:
            within = self._column_space.mT @ delta
            second = _energy(within) - _energy(left) - _energy(within @ self._right) + first
        elif self._row_space is not None:
            within = delta @ self._row_space
            second = _energy(within) - _energy(self._left.mT @ within) - _energy(right) + first
        return {zone: float(part / total) for zone, part in zip(ZONES, (first, second, complement), strict=True)}

    def random_shares(self) -> dict[str, float]:
        """The expected energy shares of a random matrix (m, n) with independent entries of equal variance."""
        rows, columns = self._left.shape[0], self._right.shape[0]
        k, rank = self.k, min(rows, columns)
        sizes = (k * k, (rank - k) ** 2, (rows - k) * (columns - k))
        return {zone: size / (rows * columns) for zone, size in zip(ZONES, sizes, strict=True)}


@torch.no_grad()
def subspace_energy(pretrained: nn.Module, experts: Mapping[str, ExpertSource]) -> pd.DataFrame:
    """The share of each task vector's energy ‖ΔW‖² in the zones of W₀.

    Returns:
        One row for each layer and expert: ``layer``, ``type``, ``expert``, ``k`` (rank of zone I), and the shares
        ``I``, ``II``, ``II+III``, from 0 to 1, NaN where the expert did not change the layer; ``random I``, … are the
        shares expected of a random matrix.

    Raises:
        PlanError: If the models cannot be upscaled together.
    """
    rows = []
    for layer in layer_deltas(pretrained, experts):
        zones = Zones(layer.weight)
        random_shares = {f"random {zone}": share for zone, share in zones.random_shares().items()}
        for expert, delta in layer.experts.items():
            key = {"layer": layer.name, "type": layer.type, "expert": expert, "k": zones.k}
            rows.append(key | zones.energy_shares(delta) | random_shares)
    return pd.DataFrame(rows)


@torch.no_grad()
def project_onto_zone(pretrained: nn.Module, expert: nn.Module, zone: Zone) -> nn.Module:
    """A copy of an expert with its task vectors projected onto one zone; other parameters are the expert's.

    Raises PlanError if the models cannot be upscaled together.
    """
    copy = deepcopy(expert)
    layers = split_attention(copy)  # with the parameters of the copy
    for layer in layer_deltas(pretrained, {"expert": expert}):
        module = layers.get_submodule(layer.name)
        matrix = routed_type_of(module).weight_matrix(cast(Tensor, module.weight))  # a view
        matrix.copy_(layer.weight + Zones(layer.weight).project(layer.experts["expert"], zone))
    return copy


def _energy(matrix: Tensor) -> Tensor:
    return matrix.double().square().sum()
