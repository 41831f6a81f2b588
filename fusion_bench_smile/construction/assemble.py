"""Assembly: from the factors of all experts to a model with routed layers."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from ..config import SmileConfig
from ..io import Provenance
from ..nn import ExpertLayout, InputRouter, RoutedLayer, routed_layers, routed_type_of, store_tensors
from ..nn.attachment import attach_router, detach_router
from ..nn.attention import replace_modules
from .factorize import FactorizedExperts, average
from .parallel import WorkPartition
from .plan import Plan


def replace_layers(
    model: nn.Module, plan: Plan, factorized: FactorizedExperts, partition: WorkPartition,
    config: SmileConfig, experts: Sequence[str],
) -> Provenance:  # fmt: skip
    """Replace the layers of a copy of the pretrained model that an expert changed by routed layers, in place.

    The layers are taken out of `factorized`. The provenance does not count the parameters of the upscaled model yet.
    """
    replacements: dict[nn.Module, RoutedLayer] = {}
    energy: dict[str, list[float]] = {}
    digests: list[list[str]] = []
    for planned in plan.layers:
        plain = model.get_submodule(planned.name)
        factors = factorized.gather_layer(planned.name, plan.num_experts, partition)
        digests.append([expert.source_digest for expert in factors.experts])
        if not factors.is_unchanged:
            energy[planned.name] = [expert.energy for expert in factors.experts]
            tensors = store_tensors(factors.tensors(cast(Tensor, plain.weight).device), config.storage)
            replacements[plain] = build_layer(plain, factors.layout(config.routing_use_diff), config, tensors)
    replace_modules(model, replacements)
    return Provenance.of_layers(experts, energy, digests, (plan.parameters, 0))


def build_layer(
    plain: nn.Module, layout: ExpertLayout, config: SmileConfig, tensors: Mapping[str, Tensor]
) -> RoutedLayer:
    """A routed layer with the parameters of a plain one and the experts' tensors."""
    layer = routed_type_of(plain).from_layer(plain, layout, config, device="meta")
    for name, value in tensors.items():
        trained = layer.weight.requires_grad and cast(Tensor, getattr(layer, name)).requires_grad
        setattr(layer, name, nn.Parameter(value, requires_grad=trained))
    return layer


def set_averages(model: nn.Module, sums: Mapping[str, Tensor], num_experts: int) -> None:
    """Set tensors of a model to the mean over the experts, from their sums; PlanError if one is out of range."""
    state = model.state_dict()  # shares memory with the model
    for name, total in sums.items():
        state[name].copy_(average(total, num_experts, name, state[name].dtype))


def set_routing(model: nn.Module, config: SmileConfig, experts: Sequence[str]) -> None:
    """Route an upscaled model as its options say, in place. All routed layers get the same config object.

    Where experts are chosen for whole inputs, the model gets a new router. The options for the factors must be those of
    the model.
    """
    detach_router(model)
    for layer in routed_layers(model).values():
        layer.set_config(config)
    if config.routing_scope == "input":
        attach_router(model, InputRouter(config, experts))
