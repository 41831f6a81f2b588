"""What the pretrained model alone sees of inputs, once for all two-pass variants: they differ in what they make of it.

A variant's decision from these is that of a model built with its options (a test holds that). Beside the options'
scores there are `IDEAS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ...layers import RIDGE, SHARES_OF_ENERGY, Routed, Score
from ...prototypes import Prototypes
from ...scopes import SMALLEST, InputRouter, detach, entrances, shares
from .variants import Variant

LEADING = 16  # directions of the pretrained layer's input
AVERAGED = tuple(kind for kind in get_args(Score) if kind not in SHARES_OF_ENERGY)  # over layers
# data-free scores that were tried and are no options
IDEAS = {
    "orthogonalised": "energy on all experts' router rows after symmetric orthogonalisation",
    "deflated": f"energy outside the {LEADING} leading input directions of W₀",
    "expected": "energy over what inputs with the covariance W₀ᵀW₀ would have",
    "output side": "energy of W₀x + b₀ on the left singular vectors of ΔWᵢ",
    "half weighted": "`dual`, of coefficients times the roots of the singular values",
    "votes": "the share of an input's tokens for which `dual` is largest",
    "first token": "`dual` of the first token alone (an image's class token)",
}
Made = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, out, projected → (…, T)


@dataclass
class Looks:
    """What was seen of N inputs.

    Attributes:
        scores: kind of score, or idea → of each layer and input, before any logarithm, (L, N, T).
        features: what prototypes know inputs by, (N, D).
    """

    scores: dict[str, Tensor]
    features: Tensor

    def of_layers(self, kind: str) -> Tensor:
        """The scores of each layer as they are combined: (L, N, T)."""
        layers = self.scores[kind]
        return layers if kind in AVERAGED else layers.clamp(min=SMALLEST).log()

    def total(self, kind: str) -> Tensor:
        """The scores of all layers together, as the two-pass router combines them: (N, T)."""
        layers = self.of_layers(kind)
        return layers.mean(dim=0) if kind in AVERAGED else layers.sum(dim=0)

    def against(self, kind: str, neutral: Looks) -> Tensor:
        """The mean over layers of scores that are each compared with those of neutral inputs: (N, T)."""
        others = neutral.of_layers(kind)
        deviation = others.std(dim=1, keepdim=True).clamp(min=1e-6)
        return ((self.of_layers(kind) - others.mean(dim=1, keepdim=True)) / deviation).mean(dim=0)

    def decided(self, variant: Variant, neutral: Looks, calibration: Sequence[Tensor]) -> Tensor:
        """The weights of the experts for each input, (N, T), as a model with the variant's options decides.

        Args:
            neutral: looks at random inputs.
            calibration: of each task, the features of training inputs.
        """
        if variant.inputs:
            prototypes = Prototypes.fit([features[: variant.inputs] for features in calibration])
            return shares(prototypes.scores(self.features), variant.top_k)
        scores = self.total(variant.score)
        if variant.noise:
            random = neutral.total(variant.score)
            scores = (scores - random.mean(dim=0)) / random.std(dim=0).clamp(min=1e-6)
        return shares(scores, variant.top_k)


@dataclass
class _Kept:
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)


class _Watcher(InputRouter):
    """Sees what a two-pass router sees, and scores it in every way."""

    def __init__(self, experts: int, ideas: Mapping[Routed, Mapping[str, Made]]) -> None:
        super().__init__("two_pass", experts, 1)
        self.ideas, self.kept = ideas, _Kept()

    def _add(self, layer: Routed, x: Tensor, out: Tensor) -> None:
        projected, energies = layer._projected(x), layer.energies(x)
        if projected is None or energies is None:
            return
        for kind in get_args(Score):
            self._keep(kind, layer._scores(x, out, projected, kind))
        for name, made in self.ideas.get(layer, {}).items():
            self._keep(name, made(x, out, projected))
        self.kept.features.append(self._mean(energies).clamp(min=SMALLEST).log().float())

    def _keep(self, name: str, of_tokens: Tensor) -> None:
        self.kept.scores.setdefault(name, []).append(self._mean(of_tokens).float())


@torch.no_grad()
def look(model: nn.Module, batches: Iterable[Mapping[str, Any]], experts: int, with_ideas: bool = False) -> Looks:
    """Look at inputs with the pretrained part of an upscaled model, whose own router is taken away.

    Args:
        batches: keyword arguments of the model.
        with_ideas: also score by `IDEAS`.
    """
    layers = [module for module in model.modules() if isinstance(module, Routed) and module.gate is not None]
    watcher = _Watcher(experts, {layer: _ideas(layer) for layer in layers} if with_ideas else {})
    detach(model)
    watcher.attach(model)
    entrance, scores, features = entrances(model)[0], [], []
    for batch in batches:
        watcher.kept = _Kept()
        watcher.scores_of(entrance, batch)
        scores.append({kind: torch.stack(of_layers) for kind, of_layers in watcher.kept.scores.items()})
        features.append(torch.cat(watcher.kept.features, dim=-1))
    detach(model)
    return Looks({kind: torch.cat([s[kind] for s in scores], dim=1) for kind in scores[0]}, torch.cat(features))


def _ideas(layer: Routed) -> dict[str, Made]:
    gate, up, weight = (layer.rows("gate"), layer.rows("up"), layer.matrix(layer.weight).float())
    assert gate is not None
    assert up is not None
    gate, layout = gate.float(), layer.layout
    values, vectors = torch.linalg.eigh(gate @ gate.mT)
    values = values.clamp(min=0) + RIDGE
    half = vectors * values**-0.5 @ vectors.mT
    leading = torch.linalg.svd(weight, full_matrices=False).Vh[:LEADING]  # (r, in)
    outside = gate - gate @ leading.mT @ leading
    of_experts = gate.split(list(layout.gate_ranks))
    expected = torch.stack([(rows @ weight.mT).square().sum() for rows in of_experts]) / weight.square().sum()
    left = nn.functional.normalize(up.float(), dim=1).split(list(layout.low_ranks))

    def energy(projected: Tensor) -> Tensor:
        return layer._norms(projected).square()

    def half_weighted(x: Tensor, out: Tensor, projected: Tensor) -> Tensor:
        return energy(layer._coefficients(projected) * layer.singular_values**0.5) / layer.token_energies(x)

    def votes(x: Tensor, out: Tensor, projected: Tensor) -> Tensor:
        mine = layer._scores(x, out, projected, "dual").argmax(dim=-1)
        few = 0.02  # no layer alone rules an expert out
        return nn.functional.one_hot(mine, layout.num_experts).float() + few

    def first_token(x: Tensor, out: Tensor, projected: Tensor) -> Tensor:
        scores = layer._scores(x, out, projected, "dual")
        return scores[:, :1].expand_as(scores) if scores.ndim == 3 else scores

    def output_side(x: Tensor, out: Tensor, projected: Tensor) -> Tensor:
        captured = [
            (out @ rows[:gates].mT).square().sum(-1) for rows, gates in zip(left, layout.gate_ranks, strict=True)
        ]
        return torch.stack(captured, dim=-1) / out.square().sum(-1, keepdim=True).clamp(min=SMALLEST)

    return {
        "orthogonalised": lambda x, out, projected: energy(projected @ half) / layer.token_energies(x),
        "deflated": lambda x, out, projected: (
            energy(x @ outside.mT)
            / (x.square().sum(-1, keepdim=True) - (x @ leading.mT).square().sum(-1, keepdim=True)).clamp(min=SMALLEST)
        ),
        "expected": lambda x, out, projected: (
            energy(projected) / layer.token_energies(x) / expected.clamp(min=SMALLEST)
        ),
        "output side": output_side,
        "half weighted": half_weighted,
        "votes": votes,
        "first token": first_token,
    }
