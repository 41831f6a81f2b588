"""SmileLinear: a linear layer with a router and low-rank experts beside it. Imports torch alone.

One product with all experts' `down` rows gives both what the router scores and what the experts need, so nothing
depends on how the tokens were routed: no loop over tokens, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE = -1


@dataclass(frozen=True)
class SmileLayout:
    """How the routed part of one layer is stored.

    Attributes:
        ranks: for each expert its rank; 0 where it left this weight unchanged, −1 where its delta is kept dense.
        gate_ranks: for each expert the number of router rows; 0 gives it the score 0.
        top_k: experts kept for each token.
        shared_router: the router rows are the first rows of the experts' `down`; otherwise they are stored apart.
        expert_bias: some expert changed the bias.
    """

    ranks: tuple[int, ...]
    gate_ranks: tuple[int, ...]
    top_k: int = 1
    shared_router: bool = True
    expert_bias: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def low_ranks(self) -> tuple[int, ...]:
        return tuple(max(rank, 0) for rank in self.ranks)

    @property
    def down_rows(self) -> tuple[int, ...]:
        """Rows of `down` for each expert: what it computes with, and what its router needs beyond that."""
        if self.shared_router:
            return tuple(max(k, g) for k, g in zip(self.low_ranks, self.gate_ranks, strict=True))
        return self.low_ranks

    @property
    def dense_experts(self) -> tuple[int, ...]:
        return tuple(i for i, rank in enumerate(self.ranks) if rank == DENSE)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SmileLayout:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


class SmileLinear(nn.Linear):
    """y = W₀x + b₀ + Σᵢ wᵢ(x)·(ΔWᵢ x + Δbᵢ), with wᵢ from the router (arXiv 2408.10174, section 4).

    `weight` (out, in) and `bias` (out,) are the pretrained ones under their old names. Beside them, each only where it
    is needed:

    - `down` (Σ down_rows, in): the leading right singular vectors of each expert's delta, expert after expert;
    - `up` (out, Σ ranks): the left singular vectors times the singular values;
    - `gate` (Σ gate_ranks, in): the router rows, where they are not the first rows of `down`;
    - `dense` (D, out, in): the deltas of the dense experts;
    - `expert_bias` (T, out): the bias deltas.
    """

    down: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    dense: Tensor | None
    expert_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: SmileLayout,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.layout = layout
        shapes = {
            "down": (sum(layout.down_rows), in_features),
            "up": (out_features, sum(layout.low_ranks)),
            "gate": (0 if layout.shared_router else sum(layout.gate_ranks), in_features),
            "dense": (len(layout.dense_experts), out_features, in_features),
            "expert_bias": (layout.num_experts if layout.expert_bias else 0, out_features),
        }
        for name, shape in shapes.items():
            empty = 0 in shape
            # zeros, not empty: a new layer computes what the pretrained one does
            self.register_parameter(
                name, None if empty else nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        layout = self.layout
        out = F.linear(x, self.weight, self.bias)
        hidden = F.linear(x, self.down) if self.down is not None else None  # (…, R)
        weights = self._weights(x, hidden).to(out.dtype)  # (…, T)
        if self.up is not None and hidden is not None:
            out = out + F.linear(_weigh(hidden, layout.down_rows, layout.low_ranks, weights), self.up)
        if self.dense is not None:
            for row, expert in enumerate(layout.dense_experts):
                out = out + weights[..., expert, None] * F.linear(x, self.dense[row])
        if self.expert_bias is not None:
            out = out + weights @ self.expert_bias.to(out.dtype)
        return out

    def scores(self, x: Tensor) -> Tensor:
        """Router scores ‖V_gateᵢᵀ x‖₂ of x (…, in): (…, T), in float32 or, for float64 input, float64."""
        hidden = F.linear(x, self.down) if self.down is not None else None
        return self._scores(x, hidden)

    def routing_weights(self, x: Tensor) -> Tensor:
        """What each expert contributes to each token of x (…, in): (…, T), at most `top_k` of them not zero."""
        hidden = F.linear(x, self.down) if self.down is not None else None
        return self._weights(x, hidden)

    def _scores(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        layout = self.layout
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = self.down if layout.shared_router else self.gate
        if rows is None:
            return x.new_zeros(*x.shape[:-1], layout.num_experts, dtype=dtype)
        if layout.shared_router and hidden is not None and hidden.dtype == dtype:
            projected = hidden
        else:  # a low-precision score sends tokens to the wrong expert
            with torch.autocast(x.device.type, enabled=False):
                projected = F.linear(x.to(dtype), rows.to(dtype))
        sizes = layout.down_rows if layout.shared_router else layout.gate_ranks
        return _norms(projected, sizes, layout.gate_ranks)

    def _weights(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        layout = self.layout
        experts = layout.num_experts
        if not any(layout.gate_ranks):
            # one expert, or experts that changed the bias alone: nothing tells the tokens apart
            return x.new_full((*x.shape[:-1], experts), 1 / experts)
        scores = self._scores(x, hidden)
        if layout.top_k >= experts:
            return scores.softmax(dim=-1)
        kept, chosen = scores.topk(layout.top_k, dim=-1)
        # softmax over the kept scores equals softmax over all, top-k, renormalise
        share = torch.ones_like(kept) if layout.top_k == 1 else kept.softmax(dim=-1)
        return torch.zeros_like(scores).scatter(-1, chosen, share)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"{super().extra_repr()}, experts={layout.num_experts}, top_k={layout.top_k}, "
            f"ranks={_short(layout.ranks)}, gate_ranks={_short(layout.gate_ranks)}"
        )


def _norms(projected: Tensor, sizes: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Per expert the norm of the first keep[i] of its sizes[i] columns: (…, Σ sizes) -> (…, T)."""
    if _uniform(sizes) and _uniform(keep):
        blocks = projected.unflatten(-1, (len(sizes), sizes[0]))
        return torch.linalg.vector_norm(blocks[..., : keep[0]], dim=-1)
    blocks = projected.split(list(sizes), dim=-1)
    return torch.stack([torch.linalg.vector_norm(b[..., :g], dim=-1) for b, g in zip(blocks, keep, strict=True)], -1)


def _weigh(hidden: Tensor, sizes: Sequence[int], keep: Sequence[int], weights: Tensor) -> Tensor:
    """The first keep[i] of each expert's columns times its weight: (…, Σ sizes), (…, T) -> (…, Σ keep)."""
    if _uniform(sizes) and _uniform(keep):
        blocks = hidden.unflatten(-1, (len(sizes), sizes[0]))
        return (blocks[..., : keep[0]] * weights[..., None]).flatten(-2)
    blocks = hidden.split(list(sizes), dim=-1)
    return torch.cat([b[..., :k] * w for b, k, w in zip(blocks, keep, weights.split(1, -1), strict=True)], dim=-1)


def _uniform(sizes: Sequence[int]) -> bool:
    return len(set(sizes)) == 1


def _short(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if _uniform(ranks) else str(list(ranks))
