"""Plain ``from_pretrained`` and ``save_pretrained`` for upscaled models: SMILE registers itself as a quantizer, which
may replace modules before transformers loads weights. ``quantization_config`` in ``config.json`` holds the metadata.

transformers ignores a quantizer that it does not know. It would load the pretrained model where this package was not
imported, if the weight of a routed layer was not stored in another shape; see `mark_checkpoint`.
"""

import functools
import json
import os
import re
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..exceptions import CheckpointError, PlanError
from ..nn.attachment import attach_router
from ..nn.attention import replace_modules, split_in_place, splittable
from ..nn.compatibility import read_layers, wrapped_weight
from ..nn.input_router import InputRouter
from ..nn.layer_types import SmileLinear, plain_type_of, routed_type_of
from ..nn.prototypes import Prototypes
from .digests import write_digests
from .file_source import file_version
from .metadata import SmileMetadata
from .safetensors_source import check_tensors, flatten_tensor
from .schema import read_json

CONFIG_FILE, METADATA_FILE = "config.json", "smile.json"
REPLACED = "was replaced while it was loaded: load it again"
METHOD = "smile"
# On disk; transformers prints it where this package was not imported. It is compared as a whole: never change it
STORED_METHOD = "smile: pip install fusion-bench-smile, and import fusion_bench_smile before from_pretrained"
FLAT_WEIGHTS = "flat_weights"
Method = Enum("Method", {"SMILE": METHOD}, type=str)  # older transformers read ``quant_method.value``


class SmileQuantizationConfig(QuantizationConfigMixin):
    """The SMILE section of ``config.json``, from metadata, or from its JSON values when transformers reads a config."""

    def __init__(self, metadata: SmileMetadata | None = None, **values: Any) -> None:
        self.quant_method = Method.SMILE  # type: ignore[assignment]
        self.metadata = SmileMetadata.from_dict(values) if metadata is None else metadata  # it checks all values
        self.flat_weights: list[str] = values.get(FLAT_WEIGHTS, [])  # of the checkpoint that is loaded

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the key ``quant_method`` that transformers looks for."""
        return {"quant_method": METHOD, **self.metadata.to_dict()}


class SmileQuantizer(HfQuantizer):
    """Builds the routed layers when transformers loads a model with a SMILE section."""

    quantization_config: SmileQuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        folder = Path(getattr(model.config, "_name_or_path", "") or "")
        self.folder = folder if folder.is_dir() else None  # None for a name on a hub
        self.version = folder_version(self.folder)
        if self.folder is not None and not metadata_of(model).describes_same_weights(read_metadata(self.folder)[0]):
            raise CheckpointError(f"{folder} {REPLACED}")
        self.shapes: dict[str, torch.Size] = {}  # of the weights that are stored in one dimension
        prepare_model(model, metadata_of(model), lambda: self._check_files(model))
        for name in self.shapes:
            weight = cast(torch.Tensor, _layer(model, name).weight)
            _layer(model, name).weight = nn.Parameter(weight.detach().flatten(), weight.requires_grad)

    def _check_files(self, model: PreTrainedModel) -> None:
        """Compare the files with the shapes of the model, whose expert tensors have no memory yet."""
        flat = self.quantization_config.flat_weights
        self.shapes = {name: cast(torch.Tensor, _layer(model, name).weight).shape for name in flat}
        stored = {f"{name}.weight": (shape.numel(),) for name, shape in self.shapes.items()}
        if self.folder is not None:
            names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
            check_tensors(self.folder, {**stored_shapes(model), **stored}, known=names)

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise a CheckpointError for missing tensors, which transformers would initialise at random."""
        missing = [key for key in missing_keys if not is_tied(model, key)]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint (first: {missing[0]})")
        return missing_keys

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if folder_version(self.folder) != self.version:  # its tensors may be of two models
            raise CheckpointError(f"{self.folder} {REPLACED}")
        for name, shape in self.shapes.items():
            _restore_shape(model.get_submodule(name), shape)
        self.quantization_config.flat_weights = []
        # SMILE is no quantization: with these marks .half(), .to() and training would be refused
        model.is_quantized = False  # type: ignore[assignment]
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.pop("quantization_method", None)
        bind_methods(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: ``save_pretrained`` is allowed."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: all parameters are ordinary ones."""
        return True


# what register_quantization_config and register_quantizer do, which transformers has from 4.50 on
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = AUTO_QUANTIZATION_CONFIG_MAPPING[STORED_METHOD] = SmileQuantizationConfig
AUTO_QUANTIZER_MAPPING[METHOD] = SmileQuantizer


def prepare_model(model: nn.Module, metadata: SmileMetadata, check_files: Callable[[], None] = lambda: None) -> None:
    """Add routed layers, router and expert parameters to a model, all zero.

    `check_files` is called before memory is allocated for them. Raises CheckpointError if the model lacks a layer.
    """
    before = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.device("meta"):
        _add_layers(model, metadata)
        _add_router(model, metadata)
    check_files()
    for module in model.modules() if device.type != "meta" else ():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) not in before:
                zeros = torch.zeros_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(zeros, parameter.requires_grad)


def _add_layers(model: nn.Module, metadata: SmileMetadata) -> None:
    attention = [name for name in metadata.split_attention if _layer(model, name)]
    if other := [name for name in attention if name not in splittable(model)]:
        raise CheckpointError(f"{other[0]} of {type(model).__name__} is no attention that can be split")
    split_in_place(model, attention)
    layers = {name: _layer(model, name) for name in metadata.layouts}
    if other := [name for name, layer in layers.items() if plain_type_of(layer) is None]:
        raise CheckpointError(f"{other[0]} of {type(model).__name__} is no layer that can be upscaled")
    if read := read_layers(model, layers):
        raise CheckpointError(f"{type(model).__name__} reads the weight of {read[0]} here without calling the layer")
    routed: dict[nn.Module, nn.Module] = {}
    for name, layout in metadata.layouts.items():
        plain = layers[name]
        routed[plain] = routed_type_of(plain).from_layer(plain, layout, metadata.config, device="meta")
    replace_modules(model, routed)


def _add_router(model: nn.Module, metadata: SmileMetadata) -> None:
    if metadata.config.routing_scope == "token":
        return
    num_experts, router = len(metadata.experts), InputRouter(metadata.config, metadata.experts)
    if metadata.prototypes is not None:
        router.prototypes = Prototypes(num_experts, *metadata.prototypes, rows=metadata.scored_rows)
    attach_router(model, router)


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        architectures = getattr(getattr(model, "config", None), "architectures", None)
        expected, kind = ", ".join(architectures or ["the class it was saved from"]), type(model).__name__
        raise CheckpointError(f"{kind} has no layer {name}; load this checkpoint with {expected}") from None


def mark_checkpoint(folder: Path, metadata: SmileMetadata, tied: Container[str]) -> None:
    """Make loaders that do not know SMILE refuse a complete checkpoint of a transformers model, and write its digests.

    The weight of the first routed layer is stored in one dimension: other loaders raise an error for its shape. Only
    the header of a file is written. Weights in `tied` are stored for other layers too, and keep their shape.
    """
    first = next((name for name in metadata.layouts if f"{name}.weight" not in tied), None)
    flat = [] if first is None or not flatten_tensor(folder, f"{first}.weight") else [first]
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["quantization_config"] |= {"quant_method": STORED_METHOD, FLAT_WEIGHTS: flat}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    write_digests(folder, config["quantization_config"])


def read_section(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The SMILE section of a folder, and the transformers config around it (None for other modules).

    Raises CheckpointError if there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a SMILE checkpoint is one")
    file = next((folder / name for name in (METADATA_FILE, CONFIG_FILE) if (folder / name).exists()), None)
    if file is None:
        problem = f"{folder} holds neither {CONFIG_FILE} nor {METADATA_FILE}"
        raise CheckpointError(f"{problem}: it is not a complete SMILE checkpoint")
    values = read_json(file)
    config = values if file.name == CONFIG_FILE else None
    section = values if config is None else values.get("quantization_config")
    if not isinstance(section, dict) or not is_smile(section):
        raise CheckpointError(f"{file} has no SMILE section: this is a checkpoint of another model")
    return section, config


def read_metadata(folder: Path) -> tuple[SmileMetadata, dict[str, Any] | None]:
    """Metadata and transformers config (None for other modules) of a folder; raises as `read_section`."""
    section, config = read_section(folder)
    return SmileMetadata.from_dict(section, str(folder)), config


def folder_version(folder: Path | None) -> frozenset[tuple[str, tuple[int, int, int]]]:
    """What identifies the files in a folder without reading them: their names, and `file_version`.

    Checkpoints are replaced as a whole and never changed in place, so that all files that were read between two equal
    versions belong to one checkpoint.
    """
    try:
        entries = os.scandir(folder) if folder is not None else ()
        return frozenset((entry.name, file_version(entry.stat())) for entry in entries)
    except OSError:  # it is replaced at this moment, or was deleted
        return frozenset()


def _restore_shape(layer: nn.Module, shape: torch.Size) -> None:
    """Give a loaded weight its own shape, also where accelerate has moved it off the device."""
    weight = cast(torch.Tensor, layer.weight)
    layer.weight = nn.Parameter(weight.detach().view(shape), weight.requires_grad)
    hook = getattr(layer, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "weights_map", None) is not None:
            part.weights_map = _OffloadedWeights(part.weights_map, shape)


class _OffloadedWeights(Mapping[str, torch.Tensor]):
    """The tensors of one layer that accelerate keeps elsewhere, with the weight in its own shape."""

    def __init__(self, stored: Mapping[str, torch.Tensor], shape: torch.Size) -> None:
        self._stored, self._shape = stored, shape

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].view(self._shape) if name == "weight" else self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def attach_metadata(model: nn.Module, metadata: SmileMetadata) -> None:
    """Attach metadata to an upscaled model, so that saving it needs nothing else."""
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = SmileQuantizationConfig(metadata)
        bind_methods(model)
    else:
        model.smile_metadata = metadata  # type: ignore[assignment]


def metadata_of(model: nn.Module) -> SmileMetadata:
    """The metadata of an upscaled model. Raises CheckpointError if the model has none."""
    if not isinstance(model, PreTrainedModel):
        metadata = getattr(model, "smile_metadata", None)
    else:
        section = getattr(model.config, "quantization_config", None)
        if isinstance(section, dict) and is_smile(section):
            section = SmileQuantizationConfig(**{k: v for k, v in section.items() if k != "quant_method"})
        metadata = section.metadata if isinstance(section, SmileQuantizationConfig) else None
    if not isinstance(metadata, SmileMetadata):
        raise CheckpointError(f"this {type(model).__name__} was not made by upscale(); there is no SMILE model to save")
    return metadata


def stored_metadata_of(model: nn.Module) -> SmileMetadata:
    """The metadata of an upscaled model that can be stored or taken apart; see `metadata_of`.

    Raises CheckpointError also for a weight that was quantized afterwards.
    """
    metadata = metadata_of(model)
    if problem := wrapped_weight(model):
        raise CheckpointError(f"{problem}, which can't be stored or changed: do this before the model is quantized")
    return metadata


def is_smile(section: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is that of an upscaled model."""
    return section.get("quant_method") in (METHOD, STORED_METHOD)


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters that a checkpoint of the model holds."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not is_tied(model, name)}


def is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers fills the parameter `name` from another one, and checkpoints leave it out."""
    ties_head = getattr(model.config.get_text_config(), "tie_word_embeddings", True)
    head = model.get_output_embeddings()
    if not ties_head and head is not None and _module_at(model, name.removesuffix(".weight")) is head:
        return False  # the classes that can tie the head say so whether they do or not
    patterns: Iterable[str] = model._tied_weights_keys or []  # a list, or from transformers 5 on a dict
    return any(re.search(pattern, name) for pattern in patterns)


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def bind_methods(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` write as `checkpoint.save` does, and ``resize_token_embeddings`` keep a routed head.

    The methods are bound to the instance, so that the class stays the one that transformers knows. Copies are bound to
    themselves. A pickled model comes back with the methods of its class.
    """

    @functools.wraps(type(model).save_pretrained)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        from .checkpoint import save  # `checkpoint` builds on this module

        save(self, save_directory, **kwargs)

    @functools.wraps(type(model).resize_token_embeddings)
    def resize_token_embeddings(self: PreTrainedModel, *args: Any, **kwargs: Any) -> nn.Module:
        return _resize_token_embeddings(self, *args, **kwargs)

    for method in (save_pretrained, resize_token_embeddings):
        method.__qualname__ = method.__name__  # pickle looks for it in the class
        setattr(model, method.__name__, types.MethodType(method, model))


def _resize_token_embeddings(
    model: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> nn.Module:
    """``resize_token_embeddings``, after which a routed head still is one. Its experts do not change new tokens."""
    head = model.get_output_embeddings()
    num_tokens = len(head.weight) if isinstance(head, SmileLinear) else None
    if num_tokens is not None and _changes_dropped_experts(head, new_num_tokens, *args, **kwargs):
        raise PlanError(
            "the head has experts with dropped entries, whose places depend on its size: resize the embeddings of all "
            "models before upscaling, or leave the head out with exclude_modules"
        )
    resized = type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)
    plain = model.get_output_embeddings()  # the routed head itself where it is tied, with another weight
    if isinstance(head, SmileLinear) and len(plain.weight) != num_tokens:
        head.resize_outputs(plain)
        model.set_output_embeddings(head)
    return resized


def _changes_dropped_experts(
    head: SmileLinear, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> bool:
    """Whether a head would get another size, of which experts with dropped entries hold the places."""
    size = len(head.weight) if new_num_tokens is None else new_num_tokens
    size += -size % (pad_to_multiple_of or 1)
    return head.smile_config.density is not None and head.dense is not None and size != len(head.weight)
