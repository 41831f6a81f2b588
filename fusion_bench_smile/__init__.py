"""SMILE for the fusion-bench framework: zero-shot sparse mixture of low-rank experts (arXiv 2408.10174).

Importing this package registers the checkpoint format with transformers, so that ``from_pretrained`` loads upscaled
models.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoint import load, save
from .config import SmileConfig
from .errors import CheckpointError, ConfigError, PlanError, SmileError
from .layers import SmileLinear
from .routing import record_routing
from .store import FactorStore
from .to_disk import upscale_to_folder
from .upscale import plan_upscaling, upscale

if TYPE_CHECKING:
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
    "load",
    "plan_upscaling",
    "record_routing",
    "save",
    "upscale",
    "upscale_to_folder",
]


def __getattr__(name: str) -> Any:
    if name == "SmileUpscalingAlgorithm":  # the framework takes seconds to import; the layers don't need it
        from .algorithm import SmileUpscalingAlgorithm

        return SmileUpscalingAlgorithm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
