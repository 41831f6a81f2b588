"""Zero-shot router scores that were tried and are no options of the package, and their descriptions.

A score maps the input x (…, in), the pretrained layer's output (…, out) and the projections of x on the router rows
(…, Σ gate_ranks) to the experts' scores (…, T).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_bench_smile.nn import (
    MIN_ENERGY_SHARE,
    RIDGE,
    RoutedLayer,
    dual_coefficients,
    expert_norms,
    router_singular_values,
    score_projections,
    token_energies,
)

NUM_LEADING = 16  # input directions of the pretrained layer
MIN_VOTES = 0.02  # no single layer excludes an expert
DESCRIPTIONS = {
    "orthogonalised": "energy on all experts' router rows after symmetric orthogonalisation",
    "deflated": f"energy outside the {NUM_LEADING} leading input directions of W₀",
    "expected": "energy relative to that of inputs with the covariance W₀ᵀW₀",
    "output side": "energy of W₀x + b₀ on the left singular vectors of ΔWᵢ",
    "half weighted": "`dual`, with coefficients times the square roots of the singular values",
    "votes": "the share of an input's tokens with the largest `dual` score",
    "first token": "`dual` of the first token alone (the class token of an image)",
}

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class AlternativeScores:
    """The alternative scores of one routed layer.

    Args:
        layer: A layer with a router and low-rank experts.
    """

    def __init__(self, layer: RoutedLayer) -> None:
        self.layer, self.layout = layer, layer.layout
        self.gate = cast(Tensor, layer.rows("gate")).float()  # (Σ gate_ranks, in)
        self.weight = layer.weight_matrix(layer.weight).float()  # (out, in)

    def scores(self) -> dict[str, Score]:
        """Name → score."""
        return {
            "orthogonalised": self.orthogonalised,
            "deflated": self.deflated,
            "expected": self.expected,
            "output side": self.output_side,
            "half weighted": self.half_weighted,
            "votes": self.votes,
            "first token": self.first_token,
        }

    def orthogonalised(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """Energy on the rows of (GGᵀ + ridge)^(−½) G, for the router rows G of all experts."""
        return self._energy(projections @ self._inverse_root) / token_energies(self.layer, x)

    def deflated(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """Energy outside the leading right singular vectors of W₀."""
        outside = self.gate - self.gate @ self._leading.mT @ self._leading
        energy = x.square().sum(-1, keepdim=True) - (x @ self._leading.mT).square().sum(-1, keepdim=True)
        return self._energy(x @ outside.mT) / energy.clamp(min=MIN_ENERGY_SHARE)

    def expected(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """Energy relative to that of inputs with the covariance W₀ᵀW₀."""
        share = self._energy(projections) / token_energies(self.layer, x)
        return share / self._expected_shares.clamp(min=MIN_ENERGY_SHARE)

    def output_side(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """Energy of the output on the leading left singular vectors of each delta."""
        blocks = zip(self._left_vectors, self.layout.gate_ranks, strict=True)
        captured = [(output @ rows[:gate_rank].mT).square().sum(-1) for rows, gate_rank in blocks]
        energy = output.square().sum(-1, keepdim=True)
        return torch.stack(captured, dim=-1) / energy.clamp(min=MIN_ENERGY_SHARE)

    def half_weighted(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """`dual`, with coefficients times the square roots of the singular values."""
        weighted = dual_coefficients(self.layer, projections) * router_singular_values(self.layer) ** 0.5
        return self._energy(weighted) / token_energies(self.layer, x)

    def votes(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """One vote of each token for the expert with the largest `dual` score."""
        best = self._dual(x, output, projections).argmax(dim=-1)
        return F.one_hot(best, self.layout.num_experts).float() + MIN_VOTES

    def first_token(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        """`dual` of the first token of each input, for all of its tokens."""
        scores = self._dual(x, output, projections)
        return scores[:, :1].expand_as(scores) if scores.ndim == 3 else scores

    def _dual(self, x: Tensor, output: Tensor, projections: Tensor) -> Tensor:
        return score_projections(self.layer, x, output, projections, "dual")

    def _energy(self, values: Tensor) -> Tensor:
        """The squared norm of each expert's columns of values (…, Σ gate_ranks): (…, T)."""
        return expert_norms(values, self.layout.gate_ranks).square()

    @cached_property
    def _inverse_root(self) -> Tensor:
        """(GGᵀ + ridge)^(−½): (Σ gate_ranks, Σ gate_ranks)."""
        values, vectors = torch.linalg.eigh(self.gate @ self.gate.mT)
        values = values.clamp(min=0) + RIDGE
        return vectors * values**-0.5 @ vectors.mT

    @cached_property
    def _leading(self) -> Tensor:
        """The leading right singular vectors of W₀: (r, in)."""
        return torch.linalg.svd(self.weight, full_matrices=False).Vh[:NUM_LEADING]

    @cached_property
    def _expected_shares(self) -> Tensor:
        """The share of energy that inputs with the covariance W₀ᵀW₀ have on each expert's router rows: (T,)."""
        blocks = self.gate.split(list(self.layout.gate_ranks))
        energies = torch.stack([(rows @ self.weight.mT).square().sum() for rows in blocks])
        return energies / self.weight.square().sum()

    @cached_property
    def _left_vectors(self) -> tuple[Tensor, ...]:
        """The left singular vectors of each expert's delta, (rank, out)."""
        up = cast(Tensor, self.layer.rows("up")).float()
        return F.normalize(up, dim=1).split(list(self.layout.low_ranks))
