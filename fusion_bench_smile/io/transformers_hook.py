"""Plain ``from_pretrained`` and ``save_pretrained`` for upscaled models: SMILE registers itself as a quantizer, which
may replace modules before transformers loads weights. ``quantization_config`` in ``config.json`` holds the metadata.
"""

import functools
import os
import re
import types
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..exceptions import CheckpointError
from ..nn.attachment import attach_router
from ..nn.expert_parameters import attach_expert_parameters
from ..nn.input_router import InputRouter
from ..nn.layer_types import routed_type_of
from ..nn.prototypes import Prototypes
from .metadata import SmileMetadata
from .safetensors_source import check_tensors

METHOD = "smile"
Method = Enum("Method", {"SMILE": METHOD}, type=str)  # older transformers read ``quant_method.value``


class SmileQuantizationConfig(QuantizationConfigMixin):
    """The SMILE section of ``config.json``, from metadata, or from its JSON values when transformers reads a config."""

    def __init__(self, metadata: SmileMetadata | None = None, **values: Any) -> None:
        self.quant_method = Method.SMILE  # type: ignore[assignment]
        self.metadata = SmileMetadata.from_dict(values) if metadata is None else metadata

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the key ``quant_method`` that transformers looks for."""
        return {"quant_method": METHOD, **self.metadata.to_dict()}


class SmileQuantizer(HfQuantizer):
    """Builds the routed layers when transformers loads a model with a SMILE section."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        prepare_model(model, metadata_of(model))
        folder = Path(getattr(model.config, "_name_or_path", "") or "")
        if folder.is_dir():
            check_tensors(folder, stored_shapes(model))

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise a CheckpointError for missing tensors, which transformers would initialise at random."""
        missing = [key for key in missing_keys if not is_tied(model, key)]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint (first: {missing[0]})")
        return missing_keys

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # SMILE is no quantization: with these marks .half(), .to() and training would be refused
        model.is_quantized = False  # type: ignore[assignment]
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.pop("quantization_method", None)
        bind_save_pretrained(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: ``save_pretrained`` is allowed."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: all parameters are ordinary ones."""
        return True


# what register_quantization_config and register_quantizer do, which transformers has from 4.50 on
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SmileQuantizationConfig
AUTO_QUANTIZER_MAPPING[METHOD] = SmileQuantizer


def prepare_model(model: nn.Module, metadata: SmileMetadata) -> None:
    """Add routed layers, router and expert parameters, all zero, to a model; CheckpointError if it lacks a layer."""
    for name, layout in metadata.layouts.items():
        plain = _layer(model, name)
        model.set_submodule(name, routed_type_of(plain).from_layer(plain, layout, metadata.config))
    if metadata.config.routing_scope == "token":
        return
    num_experts, router = len(metadata.experts), InputRouter(metadata.config, metadata.experts)
    if metadata.has_baseline:
        router.set_baseline(torch.zeros(2, num_experts))
    if metadata.prototypes is not None:
        router.prototypes = Prototypes(num_experts, *metadata.prototypes)
    attach_router(model, router)
    zeros: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameters in metadata.expert_parameters.items():
        values = {parameter: getattr(model.get_submodule(name), parameter) for parameter in parameters}
        zeros[name] = {parameter: value.new_zeros(num_experts, *value.shape) for parameter, value in values.items()}
    attach_expert_parameters(model, router, zeros)


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        architectures = getattr(getattr(model, "config", None), "architectures", None)
        expected, kind = ", ".join(architectures or ["the class it was saved from"]), type(model).__name__
        raise CheckpointError(f"{kind} has no layer {name}; load this checkpoint with {expected}") from None


def attach_metadata(model: nn.Module, metadata: SmileMetadata) -> None:
    """Attach metadata to an upscaled model, so that saving it needs nothing else."""
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = SmileQuantizationConfig(metadata)
        bind_save_pretrained(model)
    else:
        model.smile_metadata = metadata  # type: ignore[assignment]


def metadata_of(model: nn.Module) -> SmileMetadata:
    """The metadata of an upscaled model. Raises CheckpointError if the model has none."""
    if not isinstance(model, PreTrainedModel):
        metadata = getattr(model, "smile_metadata", None)
    else:
        section = getattr(model.config, "quantization_config", None)
        if isinstance(section, dict) and section.get("quant_method") == METHOD:
            section = SmileQuantizationConfig(**{k: v for k, v in section.items() if k != "quant_method"})
        metadata = section.metadata if isinstance(section, SmileQuantizationConfig) else None
    if not isinstance(metadata, SmileMetadata):
        raise CheckpointError(f"this {type(model).__name__} was not made by upscale(); there is no SMILE model to save")
    return metadata


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters that a checkpoint of the model holds."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not is_tied(model, name)}


def is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers fills the parameter `name` from another one, and checkpoints leave it out."""
    patterns: Iterable[str] = model._tied_weights_keys or []  # a list, or from transformers 5 on a dict
    return any(re.search(pattern, name) for pattern in patterns)


def bind_save_pretrained(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained``, which the framework calls, write atomically, as `checkpoint.save` does.

    The method is bound to the instance, so that the class stays the one that transformers knows. Copies are bound to
    themselves. A pickled model comes back with the method of its class.
    """

    @functools.wraps(type(model).save_pretrained)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        from .checkpoint import save  # `checkpoint` builds on this module

        save(self, save_directory, **kwargs)

    save_pretrained.__name__ = save_pretrained.__qualname__ = "save_pretrained"
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]
