"""Checkpoints: of transformers models as `transformers_hook` says, of others as safetensors and ``smile.json``."""

import json
import os
import re
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from ..exceptions import CheckpointError, SmileError
from .atomic import replace_folder_atomically
from .digests import DIGESTS_FILE, write_digests
from .model_card import HUB_NAME, write_model_card
from .safetensors_source import WEIGHTS_FILE, check_tensors, stored_tensors
from .sources import Shapes, tied_names
from .text import shortened
from .transformers_hook import (
    CONFIG_FILE,
    FLAT_WEIGHTS,
    METADATA_FILE,
    METHOD,
    REPLACED,
    attach_metadata,
    folder_version,
    mark_checkpoint,
    prepare_model,
    read_metadata,
    stored_metadata_of,
)
from .verification import verify_checkpoint

MAX_SECONDS = 60  # of attempts to load a folder that other processes replace
COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
OWN_FILES = {CONFIG_FILE, METADATA_FILE, DIGESTS_FILE}  # of one checkpoint, of no use beside another one
WEIGHTS_PATTERN = re.compile(r"\.(safetensors|bin)(\.index\.json)?$")


def save(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write an upscaled model into the folder `path`: complete, or not at all.

    An existing folder is replaced. Files in it that are no weights (a tokenizer, a README) are carried along, and so
    are those beside the pretrained model's weights. Of several processes, the one of rank 0 writes. `kwargs` are
    arguments of ``save_pretrained`` of a transformers model.

    Raises:
        CheckpointError: The folder cannot be written, or the model was not made by `upscale`.
    """
    metadata = stored_metadata_of(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    with replace_folder_atomically(Path(path), carry=is_companion) as folder:
        if isinstance(model, PreTrainedModel):
            type(model).save_pretrained(model, folder, **kwargs)
            mark_checkpoint(folder, metadata, tied_names(model))
        else:
            save_model(model, str(folder / WEIGHTS_FILE))
            section = json.loads(json.dumps({"quant_method": METHOD, **metadata.to_dict()}))
            (folder / METADATA_FILE).write_text(json.dumps(section, indent=1))
            write_digests(folder, section)
        base_model = getattr(getattr(model, "config", None), "_name_or_path", "")
        write_model_card(metadata, Path(path), folder, base_model)
        if source := local_folder(base_model):
            copy_companions(source, folder)


def load(
    path: str | os.PathLike[str] | None, pretrained: nn.Module | None = None, *, verify: bool = False
) -> nn.Module:
    """Load an upscaled model from a folder that `save` or ``save_pretrained`` wrote, in the dtype that it has there.

    A folder that is replaced meanwhile is read again: the model is one of those that were saved.

    Args:
        path: The folder. None, as of a model pool without its folder, is refused.
        pretrained: The pretrained model, which is copied and not modified. Models of transformers do not need it.
        verify: Read all tensors once more, and compare them with the digests that were saved; see `verify_checkpoint`.

    Raises:
        CheckpointError: The folder is no complete SMILE checkpoint; the reason is given.
    """
    if path is None:  # a model pool without its mandatory option
        raise CheckpointError("no folder of a SMILE checkpoint is given: set its path, e.g. modelpool.path=FOLDER")
    folder = Path(path)
    until = time.monotonic() + MAX_SECONDS
    while time.monotonic() < until:
        version = folder_version(folder)
        try:
            model = _load(folder, pretrained, verify)
        except CheckpointError:
            if folder_version(folder) == version:
                raise
        else:
            if folder_version(folder) == version:
                return model
    raise CheckpointError(f"{folder} {REPLACED}, when no other process saves there")


def _load(folder: Path, pretrained: nn.Module | None, verify: bool) -> nn.Module:
    metadata, config = read_metadata(folder)
    if verify:
        verify_checkpoint(folder)
    if config is not None:
        return _from_pretrained(folder, config)
    if pretrained is None:
        raise CheckpointError(f"{folder} holds no transformers model: give the pretrained model it was built from")
    model = deepcopy(pretrained)

    def check_files() -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        check_tensors(folder, shapes, tied_names(model))

    prepare_model(model, metadata, check_files)
    try:
        load_model(model, folder / WEIGHTS_FILE)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} can't be loaded: {shortened(error)}") from error
    attach_metadata(model, metadata)
    return model


def _from_pretrained(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The model of transformers in a folder. Raises CheckpointError for whatever transformers raises."""
    stored = stored_tensors(folder)
    check_depth(folder, config, len(stored))
    model_class = architecture(folder, config.get("architectures"))
    try:
        _check_sizes(folder, model_class, stored)
        return model_class.from_pretrained(folder, torch_dtype="auto")  # as saved
    except SmileError:
        raise
    except Exception as error:  # transformers validates little: a wrong value fails anywhere
        problem = f"{type(error).__name__}: {shortened(error)}"
        raise CheckpointError(f"{folder}: transformers can't load this checkpoint ({problem})") from error


def _check_sizes(folder: Path, model_class: type[PreTrainedModel], stored: Shapes) -> None:
    """Raise CheckpointError for a config with other sizes than the files, before memory is allocated for them."""
    config = cast(Any, model_class.config_class).from_pretrained(folder)
    flat = getattr(config, "quantization_config", {}).get(FLAT_WEIGHTS, [])
    try:
        with torch.device("meta"):
            model = model_class._from_config(config)
    except RuntimeError as error:  # transformers 4.48 reads values in the constructors of ConvNeXt and others
        if "meta" not in str(error):
            raise
        return  # transformers compares the sizes while it loads
    for name, parameter in model.named_parameters():
        shape, expected = stored.get(name), tuple(parameter.shape)
        if shape is not None and shape != expected and name.removesuffix(".weight") not in flat:
            raise CheckpointError(f"{folder}: {name} has the shape {shape}, its config says {expected}")


def check_depth(folder: Path, config: Mapping[str, Any], num_tensors: int) -> None:
    """Raise CheckpointError for a config with more layers than its files have tensors, which would be built first."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_depth(folder, value, num_tensors)
        elif "layers" in key and isinstance(value, (int, float)) and value > num_tensors:
            raise CheckpointError(f"{folder}: config.json says {key}={value}, the files hold {num_tensors} tensors")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder at `path` holds anything. It may be an incomplete checkpoint, which `load` refuses."""
    return Path(path).is_dir() and any(Path(path).iterdir())


def architecture(folder: Path, names: Any) -> type[PreTrainedModel]:
    """The transformers class that the config of a folder names; CheckpointError if transformers lacks it."""
    name = names[0] if isinstance(names, list) and names else ""
    found = getattr(transformers, name, None) if isinstance(name, str) and name else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"{folder}: config.json names the architecture {name!r}, which transformers lacks")
    return found


def is_companion(name: str) -> bool:
    """Whether a file name is not that of weights."""
    return WEIGHTS_PATTERN.search(name) is None


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside a pretrained model's weights and config, such as tokenizers, that `target` lacks."""
    for file in source.iterdir():
        small = file.is_file() and file.suffix in COMPANION_SUFFIXES and ".index." not in file.name
        if small and file.name not in OWN_FILES and not (target / file.name).exists():
            (target / file.name).write_bytes(file.read_bytes())


def local_folder(base_model: str) -> Path | None:
    """The folder of a pretrained model, or its snapshot in the hub's cache; None if there is neither."""
    if base_model and Path(base_model).is_dir():
        return Path(base_model)
    cached = try_to_load_from_cache(base_model, CONFIG_FILE) if HUB_NAME.fullmatch(base_model) else None
    return Path(cached).parent if isinstance(cached, str) else None
