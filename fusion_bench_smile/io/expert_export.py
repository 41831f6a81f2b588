"""One expert of an upscaled model as a plain checkpoint of the original class."""

import os
from copy import deepcopy
from inspect import getsource
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exceptions import PlanError
from ..nn.attention import split_names
from ..nn.input_router import ROUTER_NAME
from ..nn.merged_weights import merge
from ..nn.routed import EXPERT_TENSORS, RoutedLayer, routed_layers
from .atomic import replace_folder_atomically
from .checkpoint import OWN_FILES, copy_companions, is_companion, local_folder
from .safetensors_source import WEIGHTS_FILE
from .transformers_hook import stored_metadata_of


@torch.no_grad()
def export_expert(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> None:
    """Write one expert as a plain checkpoint, with the weights W₀ + ΔW, which needs no fusion_bench_smile to load.

    ΔW has the rank and the storage of the upscaled model, and everything outside its routed layers is as there. A
    transformers model is written by ``save_pretrained``, any other as ``model.safetensors``. An existing folder is
    replaced, with the files in it that are no weights. Head and embeddings that were tied are untied if the head is
    routed.

    Raises:
        PlanError: There is no such expert, attention was split into layers that the original class does not have, or
            the class computes otherwise without tied embeddings (T5).
        CheckpointError: The model was not made by `upscale`, or nothing can be written.
    """
    metadata = stored_metadata_of(model)
    if name not in metadata.experts:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(metadata.experts)}")
    if split := split_names(model):
        raise PlanError(f"{split[0]} was split into layers, which its class does not have; upscale without attention")
    tensors = _plain_tensors(model, metadata.experts.index(name))
    plain = _without_weights(model) if isinstance(model, PreTrainedModel) else None
    with replace_folder_atomically(Path(folder), carry=lambda n: is_companion(n) and n not in OWN_FILES) as scratch:
        if plain is None:
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, scratch / WEIGHTS_FILE)
            return
        plain.save_pretrained(scratch, state_dict=tensors)
        if source := local_folder(getattr(model.config, "_name_or_path", "")):
            copy_companions(source, scratch)


def _plain_tensors(model: nn.Module, expert: int) -> dict[str, Tensor]:
    """The tensors of the plain model under its names, with the merged weights and biases.

    A layer may have several names, and its bias too; an embedding that is tied to a weight stays as it is.
    """
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, RoutedLayer)}
    added = {f"{name}.{tensor}" for name in layers for tensor in EXPERT_TENSORS}
    given = model.state_dict(keep_vars=True)
    tensors = {k: tensor for k, tensor in given.items() if k not in added and not k.startswith(f"{ROUTER_NAME}.")}
    merged = {layer: merge(layer, ((expert, 1.0),)) for layer in layers.values()}
    biases = {id(layer.bias): bias for layer, (_, bias) in merged.items() if layer.bias is not None}
    tensors |= {name: bias for name, tensor in tensors.items() if (bias := biases.get(id(tensor))) is not None}
    for name, layer in layers.items():
        weight, bias = merged[layer]
        tensors[f"{name}.weight"] = weight
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same class on the meta device.

    Raises PlanError if it would compute otherwise once its head is untied.
    """
    config = deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):  # transformers sets the second when it loads
        config.__dict__.pop(name, None)
    if model.get_output_embeddings() in set(routed_layers(model).values()):
        if config.get_text_config().tie_word_embeddings and "tie_word_embeddings" in getsource(type(model).forward):
            raise PlanError(
                f"{type(model).__name__} computes otherwise if its head is not tied to the embeddings, and the head of "
                "the expert can't be: upscale with exclude_modules=[lm_head]"
            )
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(model)(config)
    if model.can_generate():
        plain.generation_config = deepcopy(model.generation_config)
    return cast(PreTrainedModel, nn.Module.to(plain, model.dtype))
