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
from .metadata import ExpertChange, Provenance, SmileMetadata
from .safetensors_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE, WEIGHTS_FILE, SafetensorsSource
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

if TYPE_CHECKING:
    from .adapter_source import AdapterSource
    from .peft_export import export_adapters
    from .tables import markdown_table

__all__ = [
    "ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "INDEX_FILE", "WEIGHTS_FILE", "AdapterSource", "ExpertChange", "ExpertSource",
    "Provenance", "ResizedSource", "SafetensorsSource", "SmileMetadata", "Source", "StateDictSource",
    "check_writable_folder", "export_adapters", "is_checkpoint", "lazy_source", "load", "markdown_table", "metadata_of",
    "open_source", "remove_leftovers", "replace_file_atomically", "replace_folder_atomically", "save", "stored_names",
    "tensor_digest", "tied_names", "verify_checkpoint", "write_atomically",
]  # fmt: skip
LAZY = {"AdapterSource": "adapter_source", "export_adapters": "peft_export", "markdown_table": "tables"}


def __getattr__(name: str) -> Any:
    if name in LAZY:  # PEFT and pandas take seconds to import
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
