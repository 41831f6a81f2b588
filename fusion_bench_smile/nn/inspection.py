"""Inspection of the routers of an upscaled model, and oracle routing. Costs nothing while it is not used."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..exceptions import ConfigError, PlanError
from .attachment import router_of
from .routed import RoutingEvent, layers_with_router


@contextmanager
def observe_routing(model: nn.Module, hook: Callable[[str, RoutingEvent], None]) -> Iterator[None]:
    """Call ``hook(layer name, event)`` for every router's choice inside the ``with`` block."""
    handles = [layer.register_routing_hook(partial(hook, name)) for name, layer in layers_with_router(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class LayerRouting:
    """The routing of one layer, with one entry for each call; see `RoutingEvent` for the shapes."""

    scores: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, event: RoutingEvent) -> None:
        """Record one call."""
        self.scores.append(event.scores)
        self.experts.append(event.experts)
        self.weights.append(event.weights)

    @property
    def loads(self) -> Tensor:
        """The share of all tokens' weights that each expert received: (T,), with a sum of 1."""
        total = sum(map(weight_by_expert, self.scores, self.experts, self.weights))
        assert isinstance(total, Tensor)
        return total / total.sum()


@dataclass
class LayerStatistics:
    """The routing of one layer, summed over all tokens (or inputs, where experts are chosen for these)."""

    weights: Tensor | float = 0.0  # of each expert, (T,)
    entropies: Tensor | float = 0.0  # in nats
    tokens: int = 0

    def add(self, event: RoutingEvent) -> None:
        """Add one call."""
        log_probabilities = event.scores.log_softmax(dim=-1)
        self.weights = self.weights + weight_by_expert(event.scores, event.experts, event.weights)
        self.entropies = self.entropies - (log_probabilities.exp() * log_probabilities).sum()
        self.tokens += event.scores.numel() // event.scores.shape[-1]

    @property
    def load(self) -> list[float]:
        """The share of all tokens' weights that each expert received: T numbers with a sum of 1."""
        return (torch.as_tensor(self.weights) / self.tokens).tolist()

    @property
    def entropy(self) -> float:
        """Mean entropy of the softmax over all experts, relative to a uniform one: from 0 (certain) to 1 (uniform)."""
        return float(self.entropies) / self.tokens / math.log(len(self.load))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, LayerRouting]]:
    """Record the routing of every layer with a router inside the ``with`` block.

    Example:
        >>> with record_routing(model) as routing:
        ...     model(pixel_values=images)
        >>> routing["vision_model.encoder.layers.0.mlp.fc1"].loads
    """
    record = {name: LayerRouting() for name in layers_with_router(model)}
    with observe_routing(model, lambda name, event: record[name].add(event)):
        yield record


@contextmanager
def routing_statistics(model: nn.Module) -> Iterator[dict[str, LayerStatistics]]:
    """Sum up the routing of every layer with a router inside the ``with`` block, by layer name."""
    statistics = {name: LayerStatistics() for name in layers_with_router(model)}
    with observe_routing(model, lambda name, event: statistics[name].add(event)):
        yield statistics


@contextmanager
def as_expert(model: nn.Module, name: str) -> Iterator[None]:
    """Oracle routing: serve every input with one expert inside the ``with`` block, without scoring it.

    Raises:
        ConfigError: The model routes each token (``routing_scope="token"``), or is no upscaled model.
        PlanError: There is no such expert.
    """
    router = router_of(model)
    if router is None:
        raise ConfigError("one expert for whole inputs needs another routing_scope than token, e.g. two_pass")
    if name not in router.experts:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(router.experts)}")
    one_hot = torch.eye(len(router.experts), device=next(model.parameters()).device)
    previous, router.forced = router.forced, one_hot[router.experts.index(name)]
    try:
        yield
    finally:
        router.forced = previous


def weight_by_expert(scores: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The total weight of each expert, (T,), from the experts and weights (…, top_k) of tokens with scores (…, T)."""
    total = scores.new_zeros(scores.shape[-1])
    return total.index_add_(0, experts.flatten(), weights.flatten().to(total.dtype))
