"""SMILE for the fusion-bench framework: zero-shot sparse mixture of low-rank experts (arXiv 2408.10174).

Importing this package registers the checkpoint format with transformers, so that ``from_pretrained`` loads upscaled
models.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .calibration import calibrate
from .checkpoint import load, save
from .config import SmileConfig
from .continual import add_expert, remove_expert
from .errors import CheckpointError, ConfigError, PlanError, SmileError
from .layers import SmileLinear
from .oracle import as_expert
from .routing import record_routing
from .store import FactorStore
from .to_disk import upscale_to_folder
from .upscale import plan_upscaling, upscale

if TYPE_CHECKING:
    from .adapters import export_adapters
    from .algorithm import SmileUpscalingAlgorithm


__all__ = [
    "CheckpointError",
    "ConfigError",
    "FactorStore",
    "PlanError",
    "SmileConfig",
    "SmileError",
    "SmileLinear",
    "SmileUpscalingAlgorithm",
    "__version__",
    "add_expert",
    "as_expert",
    "calibrate",
    "export_adapters",
    "load",
    "plan_upscaling",
    "record_routing",
    "remove_expert",
    "save",
    "upscale",
    "upscale_to_folder",
]


def __getattr__(name: str) -> Any:
    # the framework and PEFT take seconds to import; the layers don't need them
    if name == "SmileUpscalingAlgorithm":
        from .algorithm import SmileUpscalingAlgorithm

        return SmileUpscalingAlgorithm
    if name == "export_adapters":
        from .adapters import export_adapters

        return export_adapters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
