"""The factors of one expert, and of all experts, in one layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..nn import ExpertLayout, RoutedLayer
from ..nn.quantization import ROW_TENSORS


@dataclass(frozen=True)
class ExpertFactors:
    """What one expert adds to one layer. All tensors have the dtype and device of the pretrained layer."""

    rank: int  # the rank of the delta; 0 for an unchanged weight, −1 for a dense delta
    gate_rank: int  # the number of router rows
    down: Tensor | None = None  # the directions that are not router rows, (rows, in), or None
    up: Tensor | None = None  # left singular vectors times singular values, (rank, out), or None
    gate: Tensor | None = None  # router rows, (gate_rank, in), or None
    dense: Tensor | None = None  # the delta, (out, in), or with a density its kept entries (kept,), or None
    bias: Tensor | None = None  # the bias delta, (out,), or None
    energy: float = 1.0  # the share of ‖ΔW‖² that the rank keeps
    squared_norm: float = 0.0  # ‖ΔW‖² + ‖Δb‖², of which no rank took anything
    source_digest: str = ""  # the digest of the fine-tuned weight, or of a LoRA adapter's factors


class LayerFactors:
    """What all experts add to one layer, expert after expert, as the routed layer stores it.

    Factors are copied to their place as soon as they are computed: joining them at the end would hold them twice.
    Memory is allocated with the first expert, for the expected number of experts. `experts` holds the factors of each
    without the rows.
    """

    def __init__(self, num_experts: int, experts: Iterable[ExpertFactors] = ()) -> None:
        self._num_experts = num_experts
        self.experts: list[ExpertFactors] = []
        self._buffers: dict[str, Tensor] = {}
        self._lengths = dict.fromkeys(ROW_TENSORS, 0)
        for expert in experts:
            self.append(expert)

    @classmethod
    def from_layer(cls, layer: RoutedLayer, energies: Sequence[float] | None = None) -> LayerFactors:
        """The factors of a routed layer, dequantized, with the share of energy that each rank keeps, if it is known."""
        layout, num_experts, biases = layer.layout, layer.layout.num_experts, layer.expert_bias
        factors = cls(num_experts)
        changes = [None] * num_experts if biases is None else [bias if bias.any() else None for bias in biases]
        each_expert = zip(layout.ranks, layout.gate_ranks, changes, energies or [1.0] * num_experts, strict=True)
        factors.experts = [ExpertFactors(k, gate_k, bias=bias, energy=e) for k, gate_k, bias, e in each_expert]
        for name in ROW_TENSORS:
            if (rows := layer.kept_rows(name)) is not None:
                factors._append_rows(name, rows)
        return factors

    @property
    def is_unchanged(self) -> bool:
        """No expert changed the layer."""
        return all(expert.rank == 0 and expert.bias is None for expert in self.experts)

    def append(self, expert: ExpertFactors) -> None:
        """Copy the factors of the next expert."""
        self.experts.append(replace(expert, gate=None, down=None, up=None, dense=None))
        for name in ROW_TENSORS:
            if (rows := getattr(expert, name)) is not None:
                self._append_rows(name, rows[None] if name == "dense" else rows)

    def extend(self, other: LayerFactors) -> None:
        """Copy the factors of the next experts, which may be on another device."""
        self.experts += other.experts
        for name in other._buffers:
            self._append_rows(name, other.rows(name))

    def _append_rows(self, name: str, rows: Tensor) -> None:
        start = self._lengths[name]
        end = start + len(rows)
        if start == end:
            return
        if name not in self._buffers or end > len(self._buffers[name]):
            larger = rows.new_empty(max(end, len(rows) * self._num_experts), *rows.shape[1:])
            if start:
                larger[:start] = self.rows(name)
            self._buffers[name] = larger
        self._buffers[name][start:end] = rows
        self._lengths[name] = end

    def rows(self, name: str) -> Tensor:
        """All rows of one of the tensors of a routed layer, without spare memory."""
        buffer, length = self._buffers[name], self._lengths[name]
        return buffer if length == len(buffer) else buffer[:length].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {name: self.rows(name) for name in self._buffers}}  # no spare memory

    def layout(self, shared_router: bool) -> ExpertLayout:
        """The layout of the routed layer."""
        ranks, gate_ranks = ([getattr(e, name) for e in self.experts] for name in ("rank", "gate_rank"))
        has_bias = any(expert.bias is not None for expert in self.experts)
        return ExpertLayout(tuple(ranks), tuple(gate_ranks), shared_router, has_bias)

    def squared_singular_values(self) -> tuple[tuple[float, ...], ...]:
        """For each expert those of its directions, in descending order."""
        if "up" not in self._buffers:
            return ((),) * len(self.experts)
        squares = self.rows("up").double().square().sum(dim=1).cpu()
        return tuple(tuple(values.tolist()) for values in squares.split([max(e.rank, 0) for e in self.experts]))

    def truncate(self, ranks: Sequence[int], shared_router: bool) -> LayerFactors:
        """A copy with smaller ranks: for each expert at least the number of its router rows that are directions."""
        layout = self.layout(shared_router)
        smaller = self._select_rows(range(len(ranks)), layout, replace(layout, ranks=tuple(ranks)).rows)
        smaller.experts = [
            replace(expert, rank=rank, energy=expert.energy * _prefix_share(squares, rank))
            for expert, squares, rank in zip(self.experts, self.squared_singular_values(), ranks, strict=True)
        ]
        return smaller

    def select(self, experts: Sequence[int], shared_router: bool) -> LayerFactors:
        """A copy with some of the experts, by index."""
        layout = self.layout(shared_router)
        return self._select_rows(experts, layout, layout.rows)

    def _select_rows(
        self, experts: Sequence[int], layout: ExpertLayout, kept: Mapping[str, Sequence[int]]
    ) -> LayerFactors:
        """A copy with the first kept[name][i] rows of each expert i in `experts`."""
        selected = LayerFactors(len(experts))
        selected.experts = [self.experts[i] for i in experts]
        for name, buffer in self._buffers.items():
            sizes = layout.rows[name]
            indices = [j for i in experts for j in range(sum(sizes[:i]), sum(sizes[:i]) + kept[name][i])]
            rows = buffer.index_select(0, torch.tensor(indices, dtype=torch.long, device=buffer.device))
            selected._append_rows(name, rows)
        return selected

    def without_router(self, shared_router: bool) -> LayerFactors:
        """A copy of a single expert without router rows, which a model of one expert does not have."""
        return self.with_router(0, shared_router)

    def with_router(self, gate_rank: int, shared_router: bool = True) -> LayerFactors:
        """A copy of a single expert whose first directions, as many as `gate_rank`, are router rows."""
        (shared,) = self.layout(shared_router).shared_ranks
        rows = {name: list(self.rows(name)) for name in self._buffers}
        directions = rows.pop("gate", [])[:shared] + rows.pop("down", [])
        changed = LayerFactors(1)
        changed.experts = [replace(self.experts[0], gate_rank=gate_rank)]
        for name, kept in {**rows, "gate": directions[:gate_rank], "down": directions[gate_rank:]}.items():
            if kept:
                changed._append_rows(name, torch.stack(kept))
        return changed

    @property
    def num_bias_parameters(self) -> int:
        """The size of `expert_bias`: a row for each expert, if any expert changed the bias."""
        bias = next((expert.bias for expert in self.experts if expert.bias is not None), None)
        return 0 if bias is None else bias.numel() * len(self.experts)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The experts' tensors of the routed layer, those that are not empty."""
        tensors = {name: self.rows(name) for name in self._buffers}
        bias = next((expert.bias for expert in self.experts if expert.bias is not None), None)
        if bias is not None:
            rows = [torch.zeros_like(bias) if expert.bias is None else expert.bias for expert in self.experts]
            tensors["expert_bias"] = torch.stack([row.to(device) for row in rows])
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def _prefix_share(squares: Sequence[float], rank: int) -> float:
    """The share of a sum that its first `rank` terms have; 1 for a sum of zero."""
    values = torch.tensor(squares, dtype=torch.double)
    return float(values[:rank].sum() / values.sum()) if len(values) and values.sum() > 0 else 1.0
