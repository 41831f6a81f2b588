"""SMILE for the fusion-bench framework: zero-shot sparse mixture of low-rank experts (arXiv 2408.10174).

Importing this package registers the checkpoint format with transformers, so that ``from_pretrained`` loads upscaled
models. Public names are imported when they are first used: torch and transformers take seconds.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from ._lazy import lazy_names
from ._version import __version__

if TYPE_CHECKING:
    from .config import SmileConfig
    from .construction import (
        FactorCache,
        add_expert,
        calibrate,
        dequantize,
        plan_upscaling,
        remove_expert,
        upscale,
        upscale_to_folder,
    )
    from .exceptions import CheckpointError, ConfigError, PlanError, SmileError
    from .framework.method import SmileUpscalingAlgorithm
    from .io import export_adapters, export_expert, load, metadata_of, save, verify_checkpoint
    from .nn import RoutedLayer, SmileLinear, as_expert, choose_experts, record_choices, record_routing, use_experts
    from .serving import RequestRouter

__all__ = [
    "CheckpointError", "ConfigError", "FactorCache", "PlanError", "RequestRouter", "RoutedLayer", "SmileConfig",
    "SmileError", "SmileLinear", "SmileUpscalingAlgorithm", "__version__", "add_expert", "as_expert", "calibrate",
    "choose_experts", "dequantize", "export_adapters", "export_expert", "load", "metadata_of", "plan_upscaling",
    "record_choices", "record_routing", "remove_expert", "save", "upscale", "upscale_to_folder", "use_experts",
    "verify_checkpoint",
]  # fmt: skip
__getattr__ = lazy_names(__name__, {
    "config": ("SmileConfig",),
    "construction": (
        "FactorCache", "add_expert", "calibrate", "dequantize", "plan_upscaling", "remove_expert", "upscale",
        "upscale_to_folder",
    ),
    "exceptions": ("CheckpointError", "ConfigError", "PlanError", "SmileError"),
    "framework.method": ("SmileUpscalingAlgorithm",),
    "io": ("export_adapters", "export_expert", "load", "metadata_of", "save", "verify_checkpoint"),
    "nn": (
        "RoutedLayer", "SmileLinear", "as_expert", "choose_experts", "record_choices", "record_routing", "use_experts",
    ),
    "serving": ("RequestRouter",),
})  # fmt: skip
HOOK, MODELING = f"{__name__}.io.transformers_hook", "transformers.modeling_utils"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegistrationFinder(MetaPathFinder):
    """Has the import of transformers' models register the checkpoint format, whichever is imported first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of one module, which imports the registration after itself; None for all others."""
        if name != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(HOOK)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if MODELING in sys.modules:
    import_module(HOOK)
else:
    sys.meta_path.insert(0, _RegistrationFinder())
