"""Reading and writing: sources of tensors, checkpoints, metadata, adapters, and atomic writes."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .adapter_source import AdapterSource
    from .atomic import (
        check_writable_folder,
        remove_leftovers,
        replace_file_atomically,
        replace_folder_atomically,
        write_atomically,
    )
    from .checkpoint import is_checkpoint, load, save
    from .metadata import ExpertChange, Provenance, SmileMetadata
    from .peft_export import export_adapters
    from .safetensors_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE, WEIGHTS_FILE, SafetensorsSource
    from .sources import (
        ExpertSource,
        Source,
        StateDictSource,
        lazy_source,
        open_source,
        stored_names,
        tensor_digest,
        tied_names,
    )
    from .tables import markdown_table
    from .transformers_hook import metadata_of
    from .verification import verify_checkpoint

__all__ = [
    "ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "INDEX_FILE", "WEIGHTS_FILE", "AdapterSource", "ExpertChange", "ExpertSource",
    "Provenance", "SafetensorsSource", "SmileMetadata", "Source", "StateDictSource", "check_writable_folder",
    "export_adapters", "is_checkpoint", "lazy_source", "load", "markdown_table", "metadata_of", "open_source",
    "remove_leftovers", "replace_file_atomically", "replace_folder_atomically", "save", "stored_names",
    "tensor_digest", "tied_names", "verify_checkpoint", "write_atomically",
]  # fmt: skip
__getattr__ = lazy_names(__name__, {
    "adapter_source": ("AdapterSource",),
    "atomic": (
        "check_writable_folder", "remove_leftovers", "replace_file_atomically", "replace_folder_atomically",
        "write_atomically",
    ),
    "checkpoint": ("is_checkpoint", "load", "save"),
    "metadata": ("ExpertChange", "Provenance", "SmileMetadata"),
    "peft_export": ("export_adapters",),
    "safetensors_source": ("ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "INDEX_FILE", "WEIGHTS_FILE", "SafetensorsSource"),
    "sources": (
        "ExpertSource", "Source", "StateDictSource", "lazy_source", "open_source", "stored_names", "tensor_digest",
        "tied_names",
    ),
    "tables": ("markdown_table",),
    "transformers_hook": ("metadata_of",),
    "verification": ("verify_checkpoint",),
})  # fmt: skip
