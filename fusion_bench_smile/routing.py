"""Watch the routers of an upscaled model. Costs nothing while nobody watches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .layers import Routed, See


@dataclass
class LayerRouting:
    """What one layer's router did, one entry for each call of the layer.

    Attributes:
        scores: (…, T), float32 or float64.
        choices: the experts that served each token, (…, top_k).
        weights: theirs, (…, top_k).
    """

    scores: list[Tensor] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def see(self, scores: Tensor, choices: Tensor, weights: Tensor) -> None:
        self.scores.append(scores)
        self.choices.append(choices)
        self.weights.append(weights)

    @property
    def loads(self) -> Tensor:
        """The share of all tokens' weights that went to each expert: (T,), adding up to 1."""
        total = sum(map(_weight_of_each, self.scores, self.choices, self.weights))
        assert isinstance(total, Tensor)
        return total / total.sum()


@dataclass
class LayerStatistics:
    """What one layer's router did, summed over all tokens: memory doesn't grow with them."""

    weights: Tensor | float = 0.0  # of each expert: (T,)
    entropies: Tensor | float = 0.0
    tokens: int = 0

    def see(self, scores: Tensor, choices: Tensor, weights: Tensor) -> None:
        logs = scores.log_softmax(dim=-1)
        self.weights = self.weights + _weight_of_each(scores, choices, weights)
        self.entropies = self.entropies - (logs.exp() * logs).sum()
        self.tokens += scores.numel() // scores.shape[-1]

    @property
    def load(self) -> list[float]:
        """The share of all tokens' weights that went to each expert: T numbers, adding up to 1."""
        return (torch.as_tensor(self.weights) / self.tokens).tolist()

    @property
    def entropy(self) -> float:
        """Mean entropy of the softmax over all experts, relative to an even choice: 0 is certain, 1 undecided."""
        return float(self.entropies) / self.tokens / math.log(len(self.load))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, LayerRouting]]:
    """Record how every routed layer of `model` routes inside the ``with`` block.

    Yields:
        Layer name → what its router did, filled as the model runs. Layers without a router are left out.

    Example:
        >>> with record_routing(model) as routing:
        ...     model(pixel_values=images)
        >>> routing["vision_model.encoder.layers.0.mlp.fc1"].loads
    """
    record = {name: LayerRouting() for name in _routers(model)}
    with _watching(model, {name: layer.see for name, layer in record.items()}):
        yield record


@contextmanager
def routing_statistics(model: nn.Module) -> Iterator[dict[str, LayerStatistics]]:
    """Sum up how every routed layer of `model` routes inside the ``with`` block.

    Yields:
        Layer name → its sums, filled as the model runs.
    """
    record = {name: LayerStatistics() for name in _routers(model)}
    with _watching(model, {name: layer.see for name, layer in record.items()}):
        yield record


def _routers(model: nn.Module) -> dict[str, Routed]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Routed) and m.gate is not None}


@contextmanager
def _watching(model: nn.Module, see: dict[str, See]) -> Iterator[None]:
    """Have each router tell the scores, choices and weights that it computes anyway."""
    layers = _routers(model)
    before = {name: layer.see for name, layer in layers.items()}  # another one who watches
    for name, layer in layers.items():
        layer.see = _both(before[name], see[name])
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.see = before[name]


def _both(first: See | None, second: See) -> See:
    if first is None:
        return second

    def see(scores: Tensor, choices: Tensor, weights: Tensor) -> None:
        first(scores, choices, weights)
        second(scores, choices, weights)

    return see


def _weight_of_each(scores: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
    """How much weight went to each expert: (T,)."""
    total = scores.new_zeros(scores.shape[-1])
    return total.index_add_(0, choices.flatten(), weights.flatten().to(total.dtype))
