"""Calibrate an upscaled model's routing with a few unlabelled inputs of each expert's task. This is not zero-shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import describe, section_of
from .config import SmileConfig
from .errors import ConfigError, PlanError
from .prototypes import Prototypes
from .recipe import Recipe
from .scopes import ROUTER, InputRouter, entrances


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Have prototypes of each task's inputs choose the experts, instead of the experts' scores.

    What the pretrained model's layers make of the inputs is described by mean and shared covariance; labels aren't
    used, nor is anything trained. The prototypes become part of the model and its checkpoint.

    Args:
        model: an upscaled one with ``routing_scope="two_pass"``; it is changed.
        inputs: expert → batches of the model's keyword arguments, e.g. ``[{"pixel_values": images}]``. 4 to 64 inputs
            each are enough; all experts need some.

    Raises:
        ConfigError: if the model has another scope.
        PlanError: if inputs of an expert are missing, or there is no such expert.
        CheckpointError: if `model` was not made by `upscale`.
    """
    section = section_of(model)
    router = getattr(model, ROUTER, None)
    if not isinstance(router, InputRouter) or router.scope != "two_pass":
        raise ConfigError("calibration needs a model with routing_scope=two_pass: build it so")
    _check(section.experts, inputs)
    entrance, training = entrances(model)[0], model.training
    model.eval()
    try:
        features = [_features(router, entrance, inputs[name], name) for name in section.experts]
    finally:
        model.train(training)
    router.prototypes = Prototypes.fit(features).to(next(model.parameters()).device)
    recipe = Recipe.from_dict(section.recipe)
    before, after = recipe.parameters
    added = sum(parameter.numel() for parameter in router.prototypes.parameters())
    recipe.parameters = (before, after + added - recipe.calibrated)
    recipe.calibrated = added
    describe(model, SmileConfig.recorded(section.options), recipe)


def check_calibration(inputs: Any, config: SmileConfig) -> None:
    """Refuse a number of calibration inputs that can't be, before anything is loaded.

    Raises:
        ConfigError: if it is no number from 0 on, or options don't go with it.
    """
    if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 0:
        raise ConfigError(f"calibration={inputs!r} is not a number of inputs of each task, or 0 for none")
    if inputs and config.routing_scope != "two_pass":
        raise ConfigError(f"calibration={inputs} needs routing_scope=two_pass; it is {config.routing_scope}")
    if config.refuse_unknown and not inputs:
        raise ConfigError("refuse_unknown=true needs calibration, e.g. calibration=16: it has to know what is known")


def _check(experts: list[str], inputs: Mapping[str, Any]) -> None:
    for name in inputs:
        if name not in experts:
            raise PlanError(f"there is no expert {name!r} to calibrate; the experts are: {', '.join(experts)}")
    for name in experts:
        if name not in inputs:
            raise PlanError(f"calibration needs a few inputs of every expert's task; those of {name!r} are missing")


def _features(router: InputRouter, entrance: nn.Module, batches: Iterable[Mapping[str, Any]], name: str) -> Tensor:
    device = next(entrance.parameters()).device
    found = [
        router.features_of(entrance, {key: _on(value, device) for key, value in batch.items()}) for batch in batches
    ]
    if not found:
        raise PlanError(f"calibration needs at least one input of {name!r}")
    return torch.cat(found)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
