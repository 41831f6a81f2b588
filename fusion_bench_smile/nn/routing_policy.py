"""The policies of the routing scopes: from the scores of layers to a choice of experts for each input.

Functions of the state of a call. B is the number of inputs, T the number of experts.
"""

import torch
from torch import Tensor

from ..config import SmileConfig
from .execution import InputGroups
from .prototypes import Prototypes
from .routed import RoutedLayer
from .routing_state import RoutingState, log_energy_share
from .scoring import ENERGY_SCORES, router_scores, routing_features, routing_weights


def choose_in_layer(
    state: RoutingState, config: SmileConfig, num_experts: int, layer: RoutedLayer, x: Tensor, output: Tensor
) -> Tensor:
    """The weights of ``sequence`` and ``global`` in one layer, (B, T), kept until the next inputs."""
    if layer in state.layer_weights:
        return state.layer_weights[layer]
    token_scores, is_global = router_scores(layer, x, output), config.routing_scope == "global"
    if token_scores is not None:
        scores = _input_scores(state, config, token_scores, x)
        if is_global:
            scores = state.add_scores(scores, config.routing_score in ENERGY_SCORES)
        layer.call_routing_hooks(x, scores)
    elif is_global and state.scores is not None:
        scores = state.scores  # a layer without a router follows the layers before it
    else:
        scores = x.new_zeros(state.num_inputs or 0, num_experts)
    state.scores = scores
    state.layer_weights[layer] = routing_weights(scores, config.top_k)
    return state.layer_weights[layer]


def observe_layer(state: RoutingState, config: SmileConfig, layer: RoutedLayer, x: Tensor, output: Tensor) -> None:
    """Score a layer in the first pass of ``two_pass``, or collect its features."""
    token_values = routing_features(layer, x) if state.collects_features else router_scores(layer, x, output)
    if token_values is None:
        return
    if state.collects_features:
        state.features.append(log_energy_share(state.mean_over_tokens(token_values, x)).float())
    else:
        scores = _input_scores(state, config, token_values, x)
        state.scores = state.add_scores(scores, config.routing_score in ENERGY_SCORES)


def choose_for_all_layers(
    state: RoutingState, config: SmileConfig, num_experts: int, prototypes: Prototypes | None, baseline: Tensor | None
) -> None:
    """Set the choice of ``two_pass`` after the first pass, by prototypes if it has collected features."""
    if prototypes is not None and state.features:
        state.scores = prototypes.scores(state.input_features)
    elif state.scores is None:  # no layer has a router
        state.scores = torch.zeros(state.num_inputs or 0, num_experts)
    elif baseline is not None:
        state.scores = (state.scores - baseline[0]) / baseline[1]
    state.choice = routing_weights(state.scores, config.top_k)
    if config.refuse_unknown and prototypes is not None and state.features:
        state.choice = state.choice * prototypes.known(state.input_features)[:, None]


def group_by_expert(weights: Tensor) -> InputGroups:
    """Group inputs by the experts that have a weight above zero for them, from weights (B, T)."""
    members = [(expert, weights[:, expert].nonzero()[:, 0]) for expert in range(weights.shape[1])]
    return InputGroups(len(weights), [(expert, inputs) for expert, inputs in members if len(inputs)])


def _input_scores(state: RoutingState, config: SmileConfig, token_scores: Tensor, x: Tensor) -> Tensor:
    """The scores of inputs from those of their tokens: (B, T)."""
    scores = state.mean_over_tokens(token_scores, x)
    return log_energy_share(scores) if config.routing_score in ENERGY_SCORES else scores
