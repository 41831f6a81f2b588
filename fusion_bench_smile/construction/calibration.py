"""Inputs that adjust the routing: a few unlabelled ones of each task (calibration), or random ones (noise baseline)."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import SmileConfig
from ..exceptions import ConfigError, PlanError
from ..io import metadata_of
from ..io.metadata import describe_model
from ..io.transformers_hook import attach_metadata
from ..nn import InputRouter, Prototypes, deciding_module, router_of

NUM_INPUTS, BATCH_SIZE, NUM_TOKENS = 256, 32, 32  # of random inputs
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
    router.prototypes = Prototypes.fit(features).to(next(model.parameters()).device)
    attach_metadata(model, describe_model(model, metadata.config, metadata.experts, metadata.provenance))


def check_calibration(inputs: Any, config: SmileConfig) -> None:
    """Refuse an invalid number of calibration inputs before anything is loaded.

    Raises ConfigError if it is not a number from 0 on, or contradicts an option.
    """
    if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 0:
        raise ConfigError(f"calibration={inputs!r} is not a number of inputs of each task, or 0 for none")
    if inputs and config.routing_scope != "two_pass":
        raise ConfigError(f"calibration={inputs} needs routing_scope=two_pass; it is {config.routing_scope}")
    if config.refuse_unknown and not inputs:
        raise ConfigError("refuse_unknown=true needs calibration, e.g. calibration=16, to recognise known tasks")


def _features(router: InputRouter, module: nn.Module, batches: Batches, name: str) -> Tensor:
    device = next(module.parameters()).device
    moved = ({key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()} for batch in batches)
    features = [router.observe(module, arguments, collects_features=True).input_features for arguments in moved]
    if not features:
        raise PlanError(f"calibration needs at least one input of {name!r}")
    return torch.cat(features)


@torch.no_grad()
def measure_baseline(model: nn.Module, router: InputRouter) -> Tensor:
    """Mean and standard deviation of the experts' scores of random inputs: (2, T), float32. It is deterministic.

    Raises PlanError if the model's inputs are neither tokens nor images.
    """
    module, generator, training = deciding_module(model), torch.Generator().manual_seed(0), model.training
    model.eval()
    try:
        batches = (random_inputs(model, BATCH_SIZE, generator) for _ in range(0, NUM_INPUTS, BATCH_SIZE))
        scores = torch.cat([cast(Tensor, router.observe(module, batch).scores) for batch in batches]).float()
    finally:
        model.train(training)
    return torch.stack([scores.mean(dim=0), scores.std(dim=0).clamp(min=1e-6)])


def random_inputs(model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Any]:
    """Random keyword arguments of a transformers model, drawn by a generator on the CPU.

    They are uniform tokens (count, 32), or images with the 1/f spectrum of photographs (count, channels, size, size).
    Raises PlanError if the model takes neither.
    """
    input_name = model.main_input_name if isinstance(model, PreTrainedModel) else None
    config, parameter = getattr(model, "config", None), next(model.parameters())
    vocabulary, size = getattr(config, "vocab_size", None), getattr(config, "image_size", None)
    if input_name == "input_ids" and isinstance(vocabulary, int):
        ids = torch.randint(vocabulary, (count, NUM_TOKENS), generator=generator).to(parameter.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if input_name == "pixel_values" and isinstance(size, int):
        images = _random_images((count, getattr(config, "num_channels", 3), size, size), generator)
        return {"pixel_values": images.to(parameter.device, parameter.dtype)}
    raise PlanError(
        f"noise_baseline: random inputs are known for models of tokens (input_ids) or images (pixel_values), and "
        f"{type(model).__name__} takes {input_name or 'other inputs'}; use noise_baseline=false"
    )


def _random_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    frequencies = torch.fft.fftfreq(shape[-1]).square()
    radius = (frequencies[:, None] + frequencies).sqrt()
    radius[0, 0] = 1 / shape[-1]
    images = torch.fft.ifft2(torch.fft.fft2(torch.randn(shape, generator=generator)) / radius).real
    return images / images.std(dim=(1, 2, 3), keepdim=True)
