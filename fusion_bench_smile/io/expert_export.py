"""One expert of an upscaled model as a plain checkpoint of the original class."""

import os
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exceptions import PlanError
from ..nn.attention import split_names
from ..nn.merged_weights import merge
from ..nn.routed import EXPERT_TENSORS, routed_layers
from .atomic import replace_folder_atomically
from .checkpoint import OWN_FILES, copy_companions, is_companion, local_folder
from .safetensors_source import WEIGHTS_FILE
from .transformers_hook import metadata_of


@torch.no_grad()
def export_expert(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> None:
    """Write one expert as a plain checkpoint, with the weights W₀ + ΔW, which needs no fusion_bench_smile to load.

    ΔW has the rank and the storage of the upscaled model, and everything outside its routed layers is as there. A
    transformers model is written by ``save_pretrained``, any other as ``model.safetensors``. An existing folder is
    replaced, with the files in it that are no weights. Head and embeddings that were tied are untied if the head is
    routed.

    Raises:
        PlanError: There is no such expert, or attention was split into layers that the original class does not have.
        CheckpointError: The model was not made by `upscale`, or nothing can be written.
    """
    metadata = metadata_of(model)
    if name not in metadata.experts:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(metadata.experts)}")
    if split := split_names(model):
        raise PlanError(f"{split[0]} was split into layers, which its class does not have; upscale without attention")
    tensors = _plain_tensors(model, metadata.experts.index(name))
    with replace_folder_atomically(Path(folder), carry=lambda n: is_companion(n) and n not in OWN_FILES) as scratch:
        if not isinstance(model, PreTrainedModel):
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, scratch / WEIGHTS_FILE)
            return
        _without_weights(model).save_pretrained(scratch, state_dict=tensors)
        if source := local_folder(getattr(model.config, "_name_or_path", "")):
            copy_companions(source, scratch)


def _plain_tensors(model: nn.Module, expert: int) -> dict[str, Tensor]:
    """The tensors of the plain model under its names, with the merged weights and biases."""
    layers = routed_layers(model)
    added = {f"{layer}.{tensor}" for layer in layers for tensor in EXPERT_TENSORS}
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in added}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("smile_router.")}
    for key, layer in layers.items():
        weight, bias = merge(layer, ((expert, 1.0),))
        tensors[f"{key}.weight"] = weight
        if bias is not None:
            tensors[f"{key}.bias"] = bias
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same class on the meta device."""
    config = deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):  # transformers sets the second when it loads
        config.__dict__.pop(name, None)
    if model.get_output_embeddings() in set(routed_layers(model).values()):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(model)(config)
    return cast(PreTrainedModel, nn.Module.to(plain, model.dtype))
