"""The experts of an upscaled model as PEFT LoRA adapters, to be served by any multi-LoRA server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import replaced_folder, section_of
from .continual import directions, parts_of
from .errors import PlanError
from .kin import SmileConv1D
from .layers import DENSE, Routed, SmileLinear

PREFIX = "base_model.model."


@torch.no_grad()
def export_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write every expert of an upscaled model as a LoRA adapter for the plain pretrained model.

    An adapter gives that model what the expert adds to every routed layer, whatever the router would say:
    ``PeftModel.from_pretrained(pretrained, folder / name)``. Each layer has its own rank, and the scaling is 1.
    `upscale` takes such folders as experts again.

    Args:
        model: what `upscale` returned, or what was loaded from its checkpoint.
        folder: made where it doesn't exist; one folder for each expert, named like it. Each is complete, or not there.

    Returns:
        Expert → its folder. An expert that changed nothing gets none.

    Raises:
        PlanError: naming a layer that no LoRA adapter can express: a dense expert, or a convolution.
        CheckpointError: if `model` was not made by `upscale`, or nothing can be written.
    """
    names = section_of(model).experts
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Routed)}
    for name, layer in layers.items():
        if not isinstance(layer, (SmileLinear, SmileConv1D)):
            raise PlanError(f"{name} is a convolution, which is not exported as a LoRA adapter; upscale without them")
        if DENSE in layer.layout.ranks:
            raise PlanError(f"{name} has dense experts, which no LoRA adapter expresses; upscale with a rank k")
    biased = any(layer.expert_bias is not None for layer in layers.values())
    written = {}
    for number, name in enumerate(names):
        ranks = {layer_name: layer.layout.ranks[number] for layer_name, layer in layers.items()}
        ranks = {layer_name: rank for layer_name, rank in ranks.items() if rank}
        if ranks:
            written[name] = Path(folder) / name
            tensors = _tensors(model, layers, number, biased)
            _write(written[name], _settings(ranks, layers, biased), tensors)
    return written


def _settings(ranks: dict[str, int], layers: dict[str, Routed], biased: bool) -> LoraConfig:
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(ranks),
        bias="all" if biased else "none",
        fan_in_fan_out=any(isinstance(layers[name], SmileConv1D) for name in ranks),
        inference_mode=True,
    )


def _tensors(model: nn.Module, layers: dict[str, Routed], number: int, biased: bool) -> dict[str, Tensor]:
    """What one expert's adapter holds, under PEFT's names."""
    tensors, biases = {}, {}
    for name, layer in layers.items():
        part = parts_of(layer)[number]
        down = directions(part, layer.layout.shared_ranks[number])
        if part.rank and down is not None and part.up is not None:
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = down, part.up.mT
        if layer.expert_bias is not None:
            biases[f"{name}.bias"] = cast(Tensor, layer.bias) + layer.expert_bias[number]
    if biased:  # PEFT stores all of a model's biases, or those of adapted layers; not those of some
        adapted = {name for name in layers if f"{PREFIX}{name}.lora_A.weight" in tensors}
        for name, parameter in model.named_parameters():
            owner = name.removesuffix(".bias")
            if owner != name:
                key = f"{owner}.base_layer.bias" if owner in adapted else name
                tensors[f"{PREFIX}{key}"] = biases.get(name, parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write(folder: Path, settings: LoraConfig, tensors: dict[str, Tensor]) -> None:
    with replaced_folder(folder) as scratch:
        save_file(tensors, scratch / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        settings.save_pretrained(str(scratch))
