"""Editing: add an expert to an upscaled model or remove one, or unpack its factors."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from ..config import SmileConfig
from ..exceptions import PlanError
from ..io import ExpertSource, SmileMetadata, metadata_of
from ..io.metadata import describe_model
from ..io.names import check_expert_names
from ..io.transformers_hook import attach_metadata, stored_metadata_of
from ..nn import DENSE, detach_router, routed_layers, router_of
from ..nn.attention import replace_modules
from .assemble import replace_layers, set_routing
from .changes import check_recurrent, expert_changes, warn_of_unused_changes
from .factorize import FactorizedExperts, Factorizer, factorize_experts
from .layer_factors import ExpertFactors, LayerFactors
from .parallel import WorkPartition
from .plan import Plan, make_plan


@torch.no_grad()
def add_expert(model: nn.Module, expert: ExpertSource, name: str) -> nn.Module:
    """A new model with one more expert, given as for `upscale`. Only this expert is factored.

    Raises:
        PlanError: The expert does not fit, its name is taken, or the model cannot be extended: its other parameters are
            averages, or it was built with one expert, without the directions that its router needs.
        CheckpointError: The model was not made by `upscale`.
    """
    metadata = stored_metadata_of(model)
    _check_editable(metadata)
    check_expert_names([name])
    if name in metadata.experts:
        raise PlanError(f"there is an expert {name!r} already; the experts are: {', '.join(metadata.experts)}")
    config, experts = metadata.config, (*metadata.experts, name)
    pretrained, factors = take_apart(model, metadata)
    if len(metadata.experts) == 1:
        factors = {layer: _with_router(single, config, layer) for layer, single in factors.items()}
    plan = make_plan(pretrained, len(experts), config)
    unchanged = [ExpertFactors(rank=0, gate_rank=0)] * len(metadata.experts)
    layers = {layer.name: factors.get(layer.name) or LayerFactors(len(experts), unchanged) for layer in plan.layers}
    factorized = FactorizedExperts(layers)
    factorizer = Factorizer(config, with_router=True, workers=plan.num_workers(config.compute_device))
    factorize_experts(plan, pretrained, {name: expert}, factorizer, WorkPartition(), factorized)
    check_recurrent(plan, factorized.changes)
    extended = _assemble(pretrained, plan, factorized, metadata, experts)
    warn_of_unused_changes(metadata_of(extended).provenance)
    return extended


@torch.no_grad()
def remove_expert(model: nn.Module, name: str) -> nn.Module:
    """A new model without one of its experts.

    Raises:
        PlanError: There is no such expert, it is the last one, or the model's other parameters are averages.
        ConfigError: Fewer experts than `top_k` would remain.
        CheckpointError: The model was not made by `upscale`.
    """
    metadata = stored_metadata_of(model)
    _check_editable(metadata)
    if name not in metadata.experts:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(metadata.experts)}")
    kept = [index for index, expert in enumerate(metadata.experts) if expert != name]
    pretrained, factors = take_apart(model, metadata)
    plan, shared_router = make_plan(pretrained, len(kept), metadata.config), metadata.config.routing_use_diff
    layers = {layer: all_experts.select(kept, shared_router) for layer, all_experts in factors.items()}
    if len(kept) == 1:
        layers = {layer: single.without_router(shared_router) for layer, single in layers.items()}
    experts = [metadata.experts[index] for index in kept]
    return _assemble(pretrained, plan, FactorizedExperts(layers), metadata, experts)


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Store the factors of an upscaled model in the dtype of the model, in place, so that no call unpacks them.

    Returns the model. Raises CheckpointError if it was not made by `upscale`.
    """
    metadata = metadata_of(model)
    config = replace(metadata.config, storage="same")
    for layer in routed_layers(model).values():
        layer.dequantize()
        layer.set_config(config)
    if (router := router_of(model)) is not None:
        router.smile_config = config
    attach_metadata(model, describe_model(model, config, metadata.experts, metadata.provenance))
    return model


def take_apart(model: nn.Module, metadata: SmileMetadata) -> tuple[nn.Module, dict[str, LayerFactors]]:
    """A copy of the pretrained model inside an upscaled one, and the factors of its routed layers."""
    pretrained = deepcopy(model)
    detach_router(pretrained)
    layers, energy = routed_layers(pretrained), metadata.provenance.energy
    replace_modules(pretrained, {layer: layer.to_plain_layer() for layer in layers.values()})
    return pretrained, {name: LayerFactors.from_layer(layer, energy.get(name)) for name, layer in layers.items()}


def _assemble(
    pretrained: nn.Module, plan: Plan, factorized: FactorizedExperts, metadata: SmileMetadata, experts: Sequence[str]
) -> nn.Module:
    """The upscaled model, built in `pretrained`; the digests of experts that were there before are kept."""
    provenance = replace_layers(pretrained, plan, factorized, WorkPartition(), metadata.config, experts)
    known = {name: digest for name, digest in metadata.provenance.sources.items() if name in experts}
    changes = {name: change for name, change in metadata.provenance.changes.items() if name in experts}
    changes |= expert_changes(factorized.changes)
    provenance = replace(provenance, sources=provenance.sources | known, changes=changes)
    set_routing(pretrained, metadata.config, experts)
    attach_metadata(pretrained, describe_model(pretrained, metadata.config, experts, provenance))
    return pretrained


def _check_editable(metadata: SmileMetadata) -> None:
    config = metadata.config
    depends_on_all_experts = {
        "param_ratio": config.param_ratio is not None, "byte_ratio": config.byte_ratio is not None,
        "calibration": metadata.prototypes is not None, "average_experts=true": config.average_experts,
    }  # fmt: skip
    for name, is_set in depends_on_all_experts.items():
        if is_set:
            raise PlanError(f"the experts of a model with {name} can't be changed, it depends on all: build it anew")


def _with_router(single: LayerFactors, config: SmileConfig, layer: str) -> LayerFactors:
    """The factors of a single expert, with the router rows that it has beside others."""
    rank = single.experts[0].rank
    is_complete = 0 <= rank < config.k  # the delta has no more directions
    if not config.routing_use_diff or rank == DENSE or (rank < config.router_rank and not is_complete):
        raise PlanError(
            f"{layer} was built for one expert and lacks the {config.router_rank} directions that its router needs "
            "beside others: build the model anew with both experts"
        )
    return single.with_router(min(config.router_rank, rank))
