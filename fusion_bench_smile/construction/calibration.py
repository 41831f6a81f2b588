"""Calibration: a few unlabelled inputs of each task adjust the routing."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..exceptions import ConfigError, PlanError
from ..io import metadata_of
from ..io.metadata import describe_model
from ..io.transformers_hook import attach_metadata
from ..nn import InputRouter, Prototypes, deciding_module, router_of

Batches = Iterable[Mapping[str, Any]]


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Mapping[str, Batches]) -> None:
    """Choose experts by prototypes of each task's inputs instead of the experts' scores.

    The prototypes are fitted to features of the pretrained model's layers. Labels are not used, and nothing is trained.
    They become part of the model, which is modified, and of its checkpoint. `inputs` holds batches of the model's
    keyword arguments for each expert, ``{"sst2": [{"input_ids": ids}]}``; 4 to 64 inputs of each task are enough.

    Raises:
        ConfigError: The model has another scope.
        PlanError: The inputs of an expert are missing, or there is no such expert.
        CheckpointError: The model was not made by `upscale`.
    """
    metadata, router = metadata_of(model), router_of(model)
    if router is None:
        raise ConfigError("calibration needs a model with routing_scope=input: build it so")
    if unknown := [name for name in inputs if name not in metadata.experts]:
        names = ", ".join(metadata.experts)
        raise PlanError(f"there is no expert {unknown[0]!r} to calibrate; the experts are: {names}")
    if missing := [name for name in metadata.experts if name not in inputs]:
        raise PlanError(f"calibration needs a few inputs of every expert's task; those of {missing[0]!r} are missing")
    module, training = deciding_module(model), model.training
    model.eval()
    try:
        features = [_features(router, module, inputs[name], name) for name in metadata.experts]
    finally:
        model.train(training)
    router.prototypes = Prototypes.fit(features, rows=router.scored_rows).to(next(model.parameters()).device)
    attach_metadata(model, describe_model(model, metadata.config, metadata.experts, metadata.provenance))


def check_calibration(inputs: Any, config: SmileConfig) -> None:
    """Refuse an invalid number of calibration inputs before anything is loaded.

    Raises ConfigError if it is not a number from 0 on, or contradicts an option.
    """
    if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 0:
        raise ConfigError(f"calibration={inputs!r} is not a number of inputs of each task, or 0 for none")
    if inputs and config.routing_scope != "input":
        raise ConfigError(f"calibration={inputs} needs routing_scope=input; it is {config.routing_scope}")
    if config.refuse_unknown and not inputs:
        raise ConfigError("refuse_unknown=true needs calibration, e.g. calibration=16, to recognise known tasks")


def _features(router: InputRouter, module: nn.Module, batches: Batches, name: str) -> Tensor:
    device = next(module.parameters()).device
    moved = ({key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()} for batch in batches)
    features = [router.observe(module, arguments, collects_features=True).input_features for arguments in moved]
    if not features:
        raise PlanError(f"calibration needs at least one input of {name!r}")
    return torch.cat(features)
