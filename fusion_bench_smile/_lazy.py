"""Public names that are imported when they are first used: torch, transformers and pandas take seconds."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package: `modules` maps each of its modules to the names that it defines (PEP 562)."""
    locations = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in locations:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{locations[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
