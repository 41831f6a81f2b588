"""The experts of an upscaled model as PEFT LoRA adapters."""

import os
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..exceptions import PlanError
from ..nn.attention import SplitMultiheadAttention
from ..nn.layer_types import SmileConv1D, SmileLinear
from ..nn.layout import DENSE
from ..nn.routed import RoutedLayer, routed_layers
from .atomic import replace_folder_atomically
from .checkpoint import is_companion
from .transformers_hook import metadata_of

PREFIX = "base_model.model."


@torch.no_grad()
def export_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write every expert of an upscaled model as a LoRA adapter ``folder / name``. Returns expert → folder.

    An adapter computes what the expert adds to every routed layer, without a router:
    ``PeftModel.from_pretrained(pretrained, folder / name)``. Each layer has its own rank, and the scaling is 1.
    `upscale` takes such folders as experts. A folder is complete or absent. An expert that changed nothing has none.

    Raises:
        PlanError: A layer has a dense expert, is a convolution, or belongs to a split `torch.nn.MultiheadAttention`,
            which no LoRA adapter expresses; it is named.
        CheckpointError: The model was not made by `upscale`, or nothing can be written.
    """
    experts, layers = metadata_of(model).experts, routed_layers(model)
    for name, layer in layers.items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), SplitMultiheadAttention):
            raise PlanError(f"{name} belongs to attention, in which PEFT would ignore it; upscale without this layer")
        if not isinstance(layer, (SmileLinear, SmileConv1D)):
            raise PlanError(f"{name} is a convolution, which is not exported as a LoRA adapter; upscale without them")
        if DENSE in layer.layout.ranks:
            raise PlanError(f"{name} has dense experts, which no LoRA adapter expresses; upscale with a rank k")
    with_biases = any(layer.expert_bias is not None for layer in layers.values())
    folders = {}
    for index, name in enumerate(experts):
        ranks = {key: layer.layout.ranks[index] for key, layer in layers.items() if layer.layout.ranks[index]}
        if not ranks:
            continue
        folders[name] = Path(folder) / name
        with replace_folder_atomically(folders[name], carry=is_companion) as scratch:
            tensors = _adapter_tensors(model, layers, index, with_biases)
            save_file(tensors, scratch / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
            _lora_config(ranks, layers, with_biases).save_pretrained(str(scratch))
    return folders


def _lora_config(ranks: dict[str, int], layers: dict[str, RoutedLayer], with_biases: bool) -> LoraConfig:
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest, lora_alpha=largest, rank_pattern=pattern, alpha_pattern=pattern, target_modules=sorted(ranks),
        bias="all" if with_biases else "none", inference_mode=True,
        fan_in_fan_out=any(isinstance(layers[name], SmileConv1D) for name in ranks),
    )  # fmt: skip


def _adapter_tensors(model: nn.Module, layers: dict[str, RoutedLayer], expert: int, biased: bool) -> dict[str, Tensor]:
    """The tensors of one expert's adapter under PEFT's names."""
    tensors, biases = {}, {}
    for name, layer in layers.items():
        down, up = layer.directions(expert), layer.rows("up", expert)
        if down is not None and up is not None:
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = down, up.mT
        if layer.expert_bias is not None:
            biases[f"{name}.bias"] = cast(Tensor, layer.bias) + layer.expert_bias[expert]
    if biased:  # PEFT stores the biases of all layers or of adapted layers, not of a selection
        adapted = {name for name in layers if f"{PREFIX}{name}.lora_A.weight" in tensors}
        for name, parameter in model.named_parameters():
            owner = name.removesuffix(".bias")
            if owner != name:
                key = f"{owner}.base_layer.bias" if owner in adapted else name
                tensors[f"{PREFIX}{key}"] = biases.get(name, parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
