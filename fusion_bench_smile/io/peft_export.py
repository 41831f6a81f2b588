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
from .transformers_hook import stored_metadata_of

PREFIX = "base_model.model."


@torch.no_grad()
def export_adapters(
    model: nn.Module, folder: str | os.PathLike[str], *, equal_ranks: bool = False
) -> dict[str, Path]:  # fmt: skip
    """Write every expert of an upscaled model as a LoRA adapter ``folder / name``. Returns expert → folder.

    An adapter computes what the expert adds to every routed layer, without a router:
    ``PeftModel.from_pretrained(pretrained, folder / name)``. Each layer has its own rank, and the scaling is 1.
    `upscale` takes such folders as experts. A folder is complete or absent. An expert that changed nothing has none.

    With `equal_ranks` all experts have the same rank in all layers, padded by zeros, as ``peft.create_arrow_model``
    needs it. Its router is that of SMILE with ``gate_k=1``.

    Raises:
        PlanError: A layer has a dense expert, is a convolution, or belongs to a split `torch.nn.MultiheadAttention`,
            which no LoRA adapter expresses; it is named. With `equal_ranks` also where an expert changed a bias.
        CheckpointError: The model was not made by `upscale`, or nothing can be written.
    """
    experts, layers = stored_metadata_of(model).experts, routed_layers(model)
    for name, layer in layers.items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), SplitMultiheadAttention):
            raise PlanError(f"{name} belongs to attention, in which PEFT would ignore it; upscale without this layer")
        if not isinstance(layer, (SmileLinear, SmileConv1D)):
            raise PlanError(f"{name} is a convolution, which is not exported as a LoRA adapter; upscale without them")
        if DENSE in layer.layout.ranks:
            raise PlanError(f"{name} has dense experts, which no LoRA adapter expresses; upscale with a rank k")
    with_biases = any(layer.expert_bias is not None for layer in layers.values())
    if equal_ranks and with_biases:
        raise PlanError(
            "the experts changed biases, which equal_ranks=True can't express: Arrow weights matrices alone"
        )
    largest = max(max(layer.layout.ranks) for layer in layers.values())
    folders = {}
    for index, name in enumerate(experts):
        ranks = {key: layer.layout.ranks[index] for key, layer in layers.items() if layer.layout.ranks[index]}
        if not ranks and not equal_ranks:
            continue
        ranks = dict.fromkeys(layers, largest) if equal_ranks else ranks
        folders[name] = Path(folder) / name
        with replace_folder_atomically(folders[name], carry=is_companion) as scratch:
            tensors = _adapter_tensors(model, layers, index, ranks, with_biases)
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


def _adapter_tensors(
    model: nn.Module, layers: dict[str, RoutedLayer], expert: int, ranks: dict[str, int], biased: bool
) -> dict[str, Tensor]:
    """The tensors of one expert's adapter under PEFT's names, padded with zeros to the given ranks."""
    tensors, biases = {}, {}
    for name, layer in layers.items():
        if name in ranks:
            out_features, in_features = layer.weight_matrix(layer.weight).shape
            down, up = (layer.weight.new_zeros(ranks[name], size) for size in (in_features, out_features))
            if (rank := layer.layout.ranks[expert]) > 0:
                down[:rank], up[:rank] = cast(Tensor, layer.directions(expert)), cast(Tensor, layer.rows("up", expert))
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
