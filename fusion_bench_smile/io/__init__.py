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
    from .expert_export import export_expert
    from .file_source import FileSource
    from .hub import existing_path, hub_folder, local_path
    from .metadata import ExpertChange, Provenance, SmileMetadata
    from .peft_export import export_adapters
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
    from .tables import markdown_table
    from .text import as_yaml
    from .transformers_hook import metadata_of
    from .verification import verify_checkpoint
    from .weight_files import ADAPTER_CONFIG, MODEL_FILES, open_weights

__all__ = [
    "ADAPTER_CONFIG", "MODEL_FILES", "AdapterSource", "ExpertChange", "ExpertSource", "FileSource", "Provenance",
    "ResizedSource", "SafetensorsSource", "SmileMetadata", "Source", "StateDictSource", "as_yaml",
    "check_writable_folder", "existing_path", "export_adapters", "export_expert", "hub_folder", "is_checkpoint",
    "lazy_source", "load", "local_path", "markdown_table", "metadata_of", "open_source", "open_weights",
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
    "expert_export": ("export_expert",),
    "file_source": ("FileSource",),
    "hub": ("existing_path", "hub_folder", "local_path"),
    "metadata": ("ExpertChange", "Provenance", "SmileMetadata"),
    "peft_export": ("export_adapters",),
    "safetensors_source": ("SafetensorsSource",),
    "sources": (
        "ExpertSource", "ResizedSource", "Source", "StateDictSource", "lazy_source", "open_source", "stored_names",
        "tensor_digest", "tied_names",
    ),
    "tables": ("markdown_table",),
    "text": ("as_yaml",),
    "transformers_hook": ("metadata_of",),
    "verification": ("verify_checkpoint",),
    "weight_files": ("ADAPTER_CONFIG", "MODEL_FILES", "open_weights"),
})  # fmt: skip
