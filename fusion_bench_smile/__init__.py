"""SMILE for the fusion-bench framework: zero-shot sparse mixture of low-rank experts (arXiv 2408.10174).

Importing this package registers the checkpoint format with transformers, so that ``from_pretrained`` loads upscaled
models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import SmileConfig
from .construction import FactorCache, add_expert, calibrate, plan_upscaling, remove_expert, upscale, upscale_to_folder
from .exceptions import CheckpointError, ConfigError, PlanError, SmileError
from .io import load, metadata_of, save, verify_checkpoint
from .nn import RoutedLayer, SmileLinear, as_expert, choose_experts, record_choices, record_routing, use_experts

if TYPE_CHECKING:
    from .framework.method import SmileUpscalingAlgorithm
    from .io import export_adapters

__all__ = [
    "CheckpointError", "ConfigError", "FactorCache", "PlanError", "RoutedLayer", "SmileConfig", "SmileError",
    "SmileLinear", "SmileUpscalingAlgorithm", "__version__", "add_expert", "as_expert", "calibrate", "choose_experts",
    "export_adapters", "load", "metadata_of", "plan_upscaling", "record_choices", "record_routing", "remove_expert",
    "save", "upscale", "upscale_to_folder", "use_experts", "verify_checkpoint",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # the framework and PEFT take seconds to import, and the library works without them
    if name in (lazy := {"SmileUpscalingAlgorithm": "framework.method", "export_adapters": "io.peft_export"}):
        return getattr(import_module(f".{lazy[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
