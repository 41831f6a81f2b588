"""Reading and writing: sources of tensors, checkpoints, metadata, adapters, and atomic writes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .atomic import (
    check_writable_folder,
    remove_leftovers,
    replace_file_atomically,
    replace_folder_atomically,
    write_atomically,
)
from .checkpoint import is_checkpoint, load, save
from .file_source import FileSource
from .metadata import ExpertChange, Provenance, SmileMetadata
from .safetensors_source import SafetensorsSource
from .sources import (
    ExpertSource,
    ResizedSource,
    Source,
    StateDictSource,
    lazy_source,
    open_source,
    stored_names,
    tensor_digest,
    tied_names,
)
from .transformers_hook import metadata_of
from .verification import verify_checkpoint
from .weight_files import ADAPTER_CONFIG, MODEL_FILES, open_weights

if TYPE_CHECKING:
    from .adapter_source import AdapterSource
    from .hub import existing_path, hub_folder, local_path
    from .peft_export import export_adapters
    from .tables import markdown_table

__all__ = [
    "ADAPTER_CONFIG",
    "MODEL_FILES",
    "AdapterSource",
    "ExpertChange",
    "ExpertSource",
    "FileSource",
    "Provenance",
    "ResizedSource",
    "SafetensorsSource",
    "SmileMetadata",
    "Source",
    "StateDictSource",
    "check_writable_folder",
    "existing_path",
    "export_adapters",
    "hub_folder",
    "is_checkpoint",
    "lazy_source",
    "load",
    "local_path",
    "markdown_table",
    "metadata_of",
    "open_source",
    "open_weights",
    "remove_leftovers",
    "replace_file_atomically",
    "replace_folder_atomically",
    "save",
    "stored_names",
    "tensor_digest",
    "tied_names",
    "verify_checkpoint",
    "write_atomically",
]  # fmt: skip
LAZY = {
    "AdapterSource": "adapter_source", "existing_path": "hub", "export_adapters": "peft_export", "hub_folder": "hub",
    "local_path": "hub", "markdown_table": "tables",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in LAZY:  # PEFT and pandas take seconds to import
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
