"""Watch the routers of an upscaled model. Costs nothing while nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Routed


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

    @property
    def loads(self) -> Tensor:
        """The share of all tokens' weights that went to each expert: (T,), adding up to 1."""
        experts = self.scores[0].shape[-1]
        total = self.scores[0].new_zeros(experts)
        for choices, weights in zip(self.choices, self.weights, strict=True):
            total.index_add_(0, choices.flatten(), weights.flatten())
        return total / total.sum()


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
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Routed) and m.gate is not None}
    record = {name: LayerRouting() for name in layers}
    handles = [
        layer.register_forward_pre_hook(partial(_look, record[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _look(seen: LayerRouting, layer: Routed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["x"]
    scores = layer.scores(x)
    choices, weights = layer.chosen(scores)
    seen.scores.append(scores)
    seen.choices.append(choices)
    seen.weights.append(weights)
