"""Which layers keep the tokens of different inputs apart, as one choice of experts for each input requires.

Most layers see their inputs along the first dimension, possibly several rows for each (heads, windows, beams). Others
do not: layers of a time-first model (XLNet), experts of a mixture, which see the tokens that were gathered for them,
and layers that see no input at all, such as those of relative positions (DeBERTa). They route each token by itself.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from .routed import RoutedLayer

log = logging.getLogger(__name__)

EXPERT_CONTAINER = "experts"  # the name of the experts of a mixture in models of transformers
TOLERANCE = 0.05  # relative difference of an input's hidden states alone and in a batch; others differ by more

LayerInputs = dict[RoutedLayer, list[Tensor]]


def gathers_tokens(name: str) -> bool:
    """Whether a layer's name is that of a layer of a mixture of experts, which sees gathered tokens."""
    return EXPERT_CONTAINER in name.split(".")


def first_input(value: Any, num_inputs: int, repeated: bool) -> Any:
    """Nested arguments for the first input alone, or, `repeated`, for a batch of it and of its tokens in reverse."""
    if isinstance(value, Tensor):
        if value.ndim < 2 or value.shape[0] != num_inputs:
            return value
        return torch.cat([value[:1], value[:1].flip(1)]) if repeated else value[:1]
    if isinstance(value, dict):
        return {key: first_input(item, num_inputs, repeated) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(first_input(item, num_inputs, repeated) for item in value)
    return value


def find_token_layers(alone: LayerInputs, in_pair: LayerInputs, compares_values: bool) -> set[RoutedLayer]:
    """The layers whose inputs for one input of the model are not the first rows of those for two inputs."""
    return {layer for layer in alone if not _is_attributable(alone[layer], in_pair.get(layer, []), compares_values)}


def _is_attributable(alone: list[Tensor], in_pair: list[Tensor], compares_values: bool) -> bool:
    pairs = zip(alone, in_pair, strict=False)
    return len(alone) == len(in_pair) and all(_are_first_rows(*pair, compares_values) for pair in pairs)


def _are_first_rows(first: Tensor, both: Tensor, compares_values: bool) -> bool:
    rows = first.shape[0]
    if both.shape != (2 * rows, *first.shape[1:]):
        return False
    if not compares_values:
        return True
    difference = (both[:rows].double() - first.double()).norm()
    return bool(difference <= TOLERANCE * first.double().norm())


def log_token_layers(names: list[str], total: int) -> None:
    """Say once which layers route each token by itself."""
    log.warning(
        "routing_scope=input: %d of %d layers route each token by itself, since their tokens can't be attributed to "
        "inputs (first: %s)", len(names), total, names[0],
    )  # fmt: skip
