"""The formats of weight files: which one a folder holds."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .file_source import FileSource
from .pickled_source import PICKLED_FILE, PICKLED_INDEX, PickledSource
from .safetensors_source import INDEX_FILE, WEIGHTS_FILE, SafetensorsSource
from .sources import Shapes

ADAPTER_CONFIG = "adapter_config.json"
# in the order in which transformers and PEFT look for them
MODEL_FILES = (WEIGHTS_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def open_weights(
    path: str | os.PathLike[str], dtypes: Mapping[str, torch.dtype] | None = None,
    like: Shapes | None = None, aliases: Mapping[str, tuple[str, ...]] | None = None,
) -> FileSource:  # fmt: skip
    """The weight files of a folder, or one such file, as a source; see `FileSource`.

    Raises PlanError if files are missing or cannot be read.
    """
    pickled = is_pickled(Path(path))
    return (PickledSource if pickled else SafetensorsSource)(path, dtypes, like, aliases)


def open_adapter_weights(folder: Path) -> FileSource:
    """The tensors of a PEFT adapter; PlanError if their file is missing or cannot be read."""
    return open_weights(next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), folder))


def is_pickled(path: Path) -> bool:
    """Whether a file, or the weights of a folder, were written by `torch.save`."""
    if path.is_dir():
        found = next((name for name in MODEL_FILES if (path / name).exists()), "")
        return found in (PICKLED_FILE, PICKLED_INDEX)
    return path.suffix in (".bin", ".pt", ".pth")
