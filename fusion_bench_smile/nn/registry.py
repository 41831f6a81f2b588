"""The layer types that can be routed."""

from torch import nn

from .conv import SmileConv2d
from .linear import SmileConv1D, SmileLinear
from .routed import RoutedLayer

LAYER_TYPES: dict[type[nn.Module], type[RoutedLayer]] = {
    routed.plain_type: routed for routed in (SmileLinear, SmileConv1D, SmileConv2d)
}


def plain_type_of(module: nn.Module) -> type[nn.Module] | None:
    """The key of `LAYER_TYPES` that `module` is an instance of; None for any other module."""
    return next((plain for plain in LAYER_TYPES if isinstance(module, plain)), None)


def routed_type_of(module: nn.Module) -> type[RoutedLayer]:
    """The routed type for a layer of one of `LAYER_TYPES`."""
    plain = plain_type_of(module)
    assert plain is not None, f"{type(module).__name__} is not a layer type that can be routed"
    return LAYER_TYPES[plain]
