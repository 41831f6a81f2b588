"""Calibration of the routing with a few unlabelled inputs of each expert's task. The result is not zero-shot."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..exceptions import ConfigError, PlanError
from ..io import metadata_of
from ..io.metadata import describe_model
from ..io.transformers_hook import attach_metadata
from ..nn import InputRouter, Prototypes, entry_points, router_of

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
    if router is None or router.scope != "two_pass":
        raise ConfigError("calibration needs a model with routing_scope=two_pass: build it so")
    for name in inputs:
        if name not in metadata.experts:
            names = ", ".join(metadata.experts)
            raise PlanError(f"there is no expert {name!r} to calibrate; the experts are: {names}")
    for name in metadata.experts:
        if name not in inputs:
            raise PlanError(f"calibration needs a few inputs of every expert's task; those of {name!r} are missing")
    module, training = entry_points(model)[0], model.training
    model.eval()
    try:
        features = [_features(router, module, inputs[name], name) for name in metadata.experts]
    finally:
        model.train(training)
    router.prototypes = Prototypes.fit(features).to(next(model.parameters()).device)
    attach_metadata(model, describe_model(model, metadata.config, metadata.experts, metadata.provenance))


def check_calibration(inputs: Any, config: SmileConfig) -> None:
    """Refuse an invalid number of calibration inputs before anything is loaded.

    Raises:
        ConfigError: It is not a number from 0 on, or contradicts an option.
    """
    if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 0:
        raise ConfigError(f"calibration={inputs!r} is not a number of inputs of each task, or 0 for none")
    if inputs and config.routing_scope != "two_pass":
        raise ConfigError(f"calibration={inputs} needs routing_scope=two_pass; it is {config.routing_scope}")
    if config.refuse_unknown and not inputs:
        raise ConfigError("refuse_unknown=true needs calibration, e.g. calibration=16, to recognise known tasks")


def _features(router: InputRouter, module: nn.Module, batches: Batches, name: str) -> Tensor:
    device, features = next(module.parameters()).device, []
    for batch in batches:
        arguments = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        features.append(router.features_of(module, arguments))
    if not features:
        raise PlanError(f"calibration needs at least one input of {name!r}")
    return torch.cat(features)
