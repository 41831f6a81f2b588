"""Sources: the tensors of a model, read one at a time and never modified, from memory or from files."""

import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
Loader = TypeVar("Loader", bound=Callable[..., nn.Module])


class Source(Protocol):
    """The tensors of one model by their names in the state dict."""

    def shapes(self) -> Shapes:
        """Name → shape of every tensor, without reading any."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU or on the device of the model."""

    def identity(self, name: str) -> Hashable | None:
        """A key that identifies a tensor's content without reading it; None (the default) where only the bytes do."""
        return None

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """B (out, r) and A (r, in) of a delta B @ A stored in factors; None (the default) for any other tensor."""
        return None

    def is_pretrained(self, name: str) -> bool:
        """Whether a tensor is known, without reading it, to equal the pretrained model's. By default nothing is."""
        return False


class StateDictSource(Source):
    """Tensors in memory. They may change, so they have no identity."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: tensor.detach() for name, tensor in state.items()}

    def shapes(self) -> Shapes:
        """See `Source.shapes`."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        return self._state[name]


# what `upscale` takes as an expert
ExpertSource = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | Source | Callable[[], nn.Module]


def open_source(expert: Any, pretrained: Source, aliases: Mapping[str, tuple[str, ...]] | None = None) -> Source | None:
    """The source of a module, state dict, folder or safetensors file; None for what has to be loaded first.

    A source is returned as it is. A folder holds a model or a PEFT adapter. For `aliases` see `SafetensorsSource`.
    Raises PlanError if a folder or file cannot be read.
    """
    from .safetensors_source import ADAPTER_CONFIG, SafetensorsSource  # it builds on this module

    if isinstance(expert, (nn.Module, Mapping)):
        return StateDictSource(expert.state_dict() if isinstance(expert, nn.Module) else expert)
    if isinstance(expert, (str, os.PathLike)):
        if (Path(expert) / ADAPTER_CONFIG).exists():
            from .adapter_source import AdapterSource  # PEFT takes seconds to import

            return AdapterSource(expert, pretrained)
        return SafetensorsSource(expert, like=pretrained.shapes(), aliases=aliases)
    return expert if hasattr(expert, "read") and hasattr(expert, "shapes") else None


def lazy_source(source: Callable[..., ExpertSource]) -> Callable[[Loader], Loader]:
    """Declare where the expert of a loader function lies, so that it can be read without being loaded.

    `source` takes the arguments of the loader and returns what `upscale` takes as an expert.

    Example:
        >>> @lazy_source(adapter_folder)
        ... def load_expert(task: str) -> CLIPVisionModel: ...
    """

    def declare(loader: Loader) -> Loader:
        loader.lazy_source = source  # type: ignore[attr-defined]
        return loader

    return declare


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every tensor that a model holds under several names: each name → the other names."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(n for n in names if n != name) for names in groups.values() if len(names) > 1 for name in names}
