"""Checkpoints: of transformers models as `transformers_hook` says, of others as safetensors and ``smile.json``."""

import json
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from ..exceptions import CheckpointError
from .atomic import replace_folder_atomically
from .metadata import SmileMetadata
from .model_card import HUB_NAME, write_model_card
from .safetensors_source import WEIGHTS_FILE, check_tensors
from .sources import tied_names
from .transformers_hook import (
    CONFIG_FILE,
    METHOD,
    attach_metadata,
    is_smile,
    mark_checkpoint,
    metadata_of,
    prepare_model,
)

METADATA_FILE = "smile.json"
COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
WEIGHTS_PATTERN = re.compile(r"\.(safetensors|bin)(\.index\.json)?$")


def save(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write an upscaled model into the folder `path`: complete, or not at all.

    An existing folder is replaced. Files in it that are no weights (a tokenizer, a README) are carried along, and so
    are those beside the pretrained model's weights. Of several processes, the one of rank 0 writes. `kwargs` are
    arguments of ``save_pretrained`` of a transformers model.

    Raises:
        CheckpointError: The folder cannot be written, or the model was not made by `upscale`.
    """
    metadata = metadata_of(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    with replace_folder_atomically(Path(path), carry=is_companion) as folder:
        if isinstance(model, PreTrainedModel):
            type(model).save_pretrained(model, folder, **kwargs)
            mark_checkpoint(folder, metadata, tied_names(model))
        else:
            save_model(model, str(folder / WEIGHTS_FILE))
            (folder / METADATA_FILE).write_text(json.dumps({"quant_method": METHOD, **metadata.to_dict()}, indent=1))
        base_model = getattr(getattr(model, "config", None), "_name_or_path", "")
        write_model_card(metadata, Path(path), folder, base_model)
        if source := _local_folder(base_model):
            copy_companions(source, folder)


def load(path: str | os.PathLike[str], pretrained: nn.Module | None = None) -> nn.Module:
    """Load an upscaled model from a folder that `save` or ``save_pretrained`` wrote.

    A model that is not of transformers needs the pretrained one, which is copied and not modified.

    Raises:
        CheckpointError: The folder is no complete SMILE checkpoint; the reason is given.
    """
    folder = Path(path)
    metadata, config = read_metadata(folder)
    if config is not None:
        check_tensors(folder, {})  # readable at all? the hook compares names and shapes
        return architecture(folder, config.get("architectures")).from_pretrained(folder)
    if pretrained is None:
        raise CheckpointError(f"{folder} holds no transformers model: give the pretrained model it was built from")
    model = deepcopy(pretrained)
    prepare_model(model, metadata)
    aliases = tied_names(model)
    check_tensors(folder, {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, aliases)
    load_model(model, folder / WEIGHTS_FILE)
    attach_metadata(model, metadata)
    return model


def read_metadata(folder: Path) -> tuple[SmileMetadata, dict[str, Any] | None]:
    """Metadata and transformers config (None for other modules) of a folder; CheckpointError if it has no metadata."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a SMILE checkpoint is one")
    file = next((folder / name for name in (METADATA_FILE, CONFIG_FILE) if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError(
            f"{folder} holds neither {CONFIG_FILE} nor {METADATA_FILE}: it is not a complete SMILE checkpoint"
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from None
    config = values if file.name == CONFIG_FILE else None
    section = values if config is None else values.get("quantization_config", {})
    if not is_smile(section):
        raise CheckpointError(f"{file} has no SMILE section: this is a checkpoint of another model")
    return SmileMetadata.from_dict(section, str(folder)), config


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder at `path` holds anything. It may be an incomplete checkpoint, which `load` refuses."""
    return Path(path).is_dir() and any(Path(path).iterdir())


def architecture(folder: Path, names: Sequence[str] | None) -> type[PreTrainedModel]:
    """The transformers class that the config of a folder names; CheckpointError if transformers lacks it."""
    name = (names or [""])[0]
    if not hasattr(transformers, name):
        raise CheckpointError(f"{folder}: config.json names the architecture {name!r}, which transformers lacks")
    return getattr(transformers, name)


def is_companion(name: str) -> bool:
    """Whether a file name is not that of weights."""
    return WEIGHTS_PATTERN.search(name) is None


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside a pretrained model's weights and config, such as tokenizers, that `target` lacks."""
    for file in source.iterdir():
        small = file.is_file() and file.suffix in COMPANION_SUFFIXES
        if small and ".index." not in file.name and file.name != CONFIG_FILE and not (target / file.name).exists():
            (target / file.name).write_bytes(file.read_bytes())


def _local_folder(base_model: str) -> Path | None:
    """The folder of a pretrained model, or its snapshot in the hub's cache; None if there is neither."""
    if base_model and Path(base_model).is_dir():
        return Path(base_model)
    cached = try_to_load_from_cache(base_model, CONFIG_FILE) if HUB_NAME.fullmatch(base_model) else None
    return Path(cached).parent if isinstance(cached, str) else None
