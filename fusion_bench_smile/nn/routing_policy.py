"""The policy of routing whole inputs: from the scores of layers to a choice of experts for each input.

Functions of the state of a call. B is the number of inputs, T the number of experts.
"""

import torch
from torch import Tensor

from ..config import SmileConfig
from .energy import SCORED_ROWS, energy_shares, forget_rows, routing_features
from .prototypes import Prototypes
from .routed import RoutedLayer
from .routing_state import RoutingState, log_energy_share
from .scoring import routing_weights

SHARPNESS = 4.0  # of the softmax over experts; chosen on images, sentences and prompts together
LEAST_SPREAD = 0.1  # few layers say little about their deviation; over many it is 0.3 to 0.5


def observe_layer(state: RoutingState, layer: RoutedLayer, x: Tensor, rows: int | None = SCORED_ROWS) -> None:
    """Add the logarithms of a layer's energy shares, or its features for prototypes, in the first pass."""
    if state.is_trained:
        forget_rows(layer)
    token_values = (routing_features if state.collects_features else energy_shares)(layer, x, rows)
    if state.is_trained:
        forget_rows(layer)
    if token_values is not None:
        state.features.append(log_energy_share(state.mean_over_tokens(token_values)).float())


def choose_for_all_layers(
    state: RoutingState, config: SmileConfig, num_experts: int, prototypes: Prototypes | None
) -> None:
    """Set scores and choice after the first pass, by prototypes if there are some.

    The weights of an input's `top_k` experts are the softmax of their scores: those of `spread_scores`, or the
    prototypes' log-likelihoods.
    """
    if not state.features:  # no layer has a router
        state.scores = torch.zeros(state.num_inputs or 0, num_experts)
    elif state.collects_features and prototypes is not None:
        state.scores = prototypes.scores(state.input_features)
    elif not state.collects_features:
        state.scores = spread_scores(torch.stack(state.features))
    else:  # features to fit prototypes to
        return
    state.choice, state.num_served = routing_weights(state.scores, config.top_k), config.top_k
    if config.refuse_unknown and prototypes is not None and state.features:
        state.choice = state.choice * prototypes.known(state.input_features)[:, None]


def spread_scores(log_shares: Tensor) -> Tensor:
    """How far each expert is behind an input's best one, in standard deviations over the layers: (B, T), at most zero.

    Args:
        log_shares: The logarithms of the energy shares in L layers, (L, B, T).
    """
    best = log_shares.mean(dim=0).argmax(dim=-1)  # (B,)
    behind = log_shares.gather(-1, best[None, :, None].expand(len(log_shares), -1, 1)) - log_shares
    mean = behind.mean(dim=0)
    spread = (behind - mean).square().mean(dim=0).sqrt().clamp(min=LEAST_SPREAD)
    return -SHARPNESS * mean / spread
