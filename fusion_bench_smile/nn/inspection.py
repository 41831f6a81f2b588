"""Inspection of the routers of an upscaled model, and oracle routing. Costs nothing while it is not used."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import ConfigError, PlanError
from .attachment import deciding_module, router_of
from .input_router import InputRouter
from .routed import RoutingEvent, layers_with_router
from .routing_state import RoutingState, activate

log = logging.getLogger(__name__)


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
    """Sum up the routing of every layer with a router inside the ``with`` block, by layer name.

    A warning names layers that were not called although others were: other code may read their weights.
    """
    statistics = {name: LayerStatistics() for name in layers_with_router(model)}
    with observe_routing(model, lambda name, event: statistics[name].add(event)):
        yield statistics
    silent = [name for name, layer in statistics.items() if not layer.tokens]
    if 0 < len(silent) < len(statistics):
        log.warning(
            "%d of %d routed layers were not called, and their experts had no effect (first: %s)",
            len(silent), len(statistics), silent[0],
        )  # fmt: skip


@contextmanager
def record_choices(model: nn.Module) -> Iterator[list[RoutingState]]:
    """Record the choice for the inputs of every call of a model inside the ``with`` block.

    A state has ``scores`` and ``choice``, the weight of each expert for each input, both (B, T).

    Raises:
        ConfigError: The model routes each token (``routing_scope="token"``), or is no upscaled model.
    """
    choices: list[RoutingState] = []
    handle = _router_for_inputs(model).register_choice_hook(choices.append)
    try:
        yield choices
    finally:
        handle.remove()


def choose_experts(model: nn.Module, **inputs: Any) -> Tensor:
    """The weight of each expert for each input, (B, T), by a first pass of the pretrained model.

    `inputs` are the keyword arguments of the model, or of the encoder of an encoder-decoder. `use_experts` takes the
    result.

    Raises:
        ConfigError: The model routes each token (``routing_scope="token"``), or is no upscaled model.
    """
    return _router_for_inputs(model).choose(deciding_module(model), inputs)


@contextmanager
def use_experts(model: nn.Module, weights: Tensor) -> Iterator[None]:
    """Serve inputs with given experts inside the ``with`` block, without scoring them.

    Any part of the model can be called. `weights` holds the weight of each expert for all inputs (T,), or for each
    (B, T).

    Raises:
        ConfigError: The model routes each token (``routing_scope="token"``), is no upscaled model, or the shape is
            another.
    """
    router = _router_for_inputs(model)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(router.experts):
        expected = f"({len(router.experts)},) or (inputs, {len(router.experts)})"
        raise ConfigError(f"the weights of the experts have the shape {tuple(weights.shape)}; it must be {expected}")
    weights = weights.detach().clone().reshape(-1, len(router.experts)).to(next(model.parameters()).device)
    state = RoutingState(router, num_inputs=len(weights), scores=weights, choice=weights, is_given=True)
    if not weights.is_meta:
        state.num_served = max(1, int(weights.count_nonzero(dim=-1).max())) if len(weights) else 1
    if (choice := state.one_choice) is not None:
        router.merged_weights.announce(choice)
        state.merges = True
    try:
        with activate(state):
            yield
    finally:
        router.merged_weights.clear()


@contextmanager
def as_expert(model: nn.Module, name: str) -> Iterator[None]:
    """Oracle routing: serve every input with one expert inside the ``with`` block, without scoring it.

    Raises:
        ConfigError: The model routes each token (``routing_scope="token"``), or is no upscaled model.
        PlanError: There is no such expert.
    """
    experts = _router_for_inputs(model).experts
    if name not in experts:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(experts)}")
    with use_experts(model, torch.eye(len(experts))[experts.index(name)]):
        yield


def _router_for_inputs(model: nn.Module) -> InputRouter:
    router = router_of(model)
    if router is None:
        raise ConfigError("experts for whole inputs need routing_scope=input: build the model so")
    return router


def weight_by_expert(scores: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The total weight of each expert, (T,), from the experts and weights (…, top_k) of tokens with scores (…, T)."""
    total = scores.new_zeros(scores.shape[-1])
    return total.index_add_(0, experts.flatten(), weights.flatten().to(total.dtype))
