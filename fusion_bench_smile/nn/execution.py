"""The execution of a routed layer: that of `token_execution` or of `input_execution`, as its router chooses experts.

``execution="masked"`` computes all experts and multiplies most of them by zero. ``execution="grouped"`` computes the
experts of each token or input alone. ``"auto"`` takes what is cheapest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from .input_execution import by_input
from .token_execution import by_token

if TYPE_CHECKING:
    from .routed import RoutedLayer


def routed_output(layer: RoutedLayer, x: Tensor) -> Tensor:
    """The output of a routed layer for x (…, in): (…, out)."""
    router = layer.input_router
    state = None if router is None else router.state_for(layer)
    if router is None or state is None:
        return by_token(layer, x)
    weights = router.weights(state, layer, x)
    if weights is None:  # the first pass
        return layer.plain_output(x, layer.weight, cast("Tensor | None", layer.bias))
    return by_input(layer, x, state, weights)
