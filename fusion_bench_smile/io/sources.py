"""Sources: the tensors of a model, read one at a time and never modified, from memory or from files."""

import os
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import xxhash
from torch import Tensor, nn

from ..nn.attention import names_before_splitting

Shapes = Mapping[str, tuple[int, ...]]
Loader = TypeVar("Loader", bound=Callable[..., nn.Module])


def tensor_digest(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and bytes: 32 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous()
    seed = xxhash.xxh32_intdigest(f"{data.dtype}{tuple(data.shape)}".encode())
    return xxhash.xxh3_128(data.reshape(-1).view(torch.uint8).numpy().data, seed=seed).hexdigest()


class Source(Protocol):
    """The tensors of one model by their names in the state dict."""

    def shapes(self) -> Shapes:
        """Name → shape of every tensor, without reading any."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU or on the device of the model."""

    def identity(self, name: str) -> Hashable | None:
        """A key that identifies a tensor's content without reading it; None (the default) where only the bytes do."""
        return None

    def stamp(self) -> Hashable | None:
        """A key that identifies the content of all tensors without reading them; None (the default) without one."""
        return None

    def digest(self) -> str:
        """A hash of the names and contents of all tensors, which are read."""
        digests = [(name, tensor_digest(self.read(name))) for name in sorted(self.shapes())]
        return xxhash.xxh3_128(repr(digests).encode()).hexdigest()

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """B (out, r) and A (r, in) of a delta B @ A stored in factors; None (the default) for any other tensor."""
        return None

    def is_pretrained(self, name: str) -> bool:
        """Whether a tensor is known, without reading it, to equal the pretrained model's. By default nothing is."""
        return False

    def max_rank(self, name: str) -> int | None:
        """An upper bound of the rank of a weight's delta, if one is known without reading it."""
        return 0 if self.is_pretrained(name) else None

    def nbytes(self) -> int | None:
        """The size of the files, if they hold less than a whole model; None (the default) for whole models."""
        return None


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


class RenamedSource(Source):
    """The tensors of another source under other names: name → name in that source."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def shapes(self) -> Shapes:
        """See `Source.shapes`."""
        shapes = self._source.shapes()
        return {name: shapes[stored] for name, stored in self._names.items()}

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        return self._source.read(self._names[name])

    def identity(self, name: str) -> Hashable | None:
        """See `Source.identity`."""
        return self._source.identity(self._names[name])

    def stamp(self) -> Hashable | None:
        """See `Source.stamp`."""
        stamp = self._source.stamp()
        return None if stamp is None else (stamp, tuple(sorted(self._names.items())))

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """See `Source.low_rank`."""
        return self._source.low_rank(self._names[name])

    def is_pretrained(self, name: str) -> bool:
        """See `Source.is_pretrained`."""
        return self._source.is_pretrained(self._names[name])

    def max_rank(self, name: str) -> int | None:
        """See `Source.max_rank`."""
        return self._source.max_rank(self._names[name])

    def nbytes(self) -> int | None:
        """See `Source.nbytes`."""
        return self._source.nbytes()


class ResizedSource(Source):
    """An expert with the pretrained model's shapes, where some of its tensors have more or fewer rows.

    Rows that both have are the expert's, rows that the expert lacks are the pretrained ones, and additional rows are
    not used.

    Args:
        resized: The names of the tensors with another number of rows.
        kept: Those of them that are left as pretrained.
    """

    def __init__(
        self, source: Source, pretrained: Source, resized: Collection[str], kept: Collection[str] = ()
    ) -> None:  # fmt: skip
        self._source, self._pretrained = source, pretrained
        self._resized, self._kept = frozenset(resized), frozenset(resized) & frozenset(kept)

    def shapes(self) -> Shapes:
        """See `Source.shapes`."""
        pretrained = self._pretrained.shapes()
        return {**self._source.shapes(), **{name: pretrained[name] for name in self._resized}}

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        if name in self._kept:
            return self._pretrained.read(name)
        tensor = self._source.read(name)
        if name not in self._resized:
            return tensor
        pretrained = self._pretrained.read(name).to(tensor)
        return torch.cat([tensor[: len(pretrained)], pretrained[len(tensor) :]])

    def identity(self, name: str) -> Hashable | None:
        """See `Source.identity`. A resized tensor depends on the pretrained model too, so it has none."""
        return None if name in self._resized else self._source.identity(name)

    def stamp(self) -> Hashable | None:
        """See `Source.stamp`. The pretrained model is not part of it."""
        return self._source.stamp()

    def digest(self) -> str:
        """See `Source.digest`. The pretrained model is not part of it."""
        return self._source.digest()

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """See `Source.low_rank`."""
        return None if name in self._resized else self._source.low_rank(name)

    def is_pretrained(self, name: str) -> bool:
        """See `Source.is_pretrained`."""
        return name in self._kept or (name not in self._resized and self._source.is_pretrained(name))

    def max_rank(self, name: str) -> int | None:
        """See `Source.max_rank`."""
        return super().max_rank(name) if name in self._resized else self._source.max_rank(name)

    def nbytes(self) -> int | None:
        """See `Source.nbytes`."""
        return self._source.nbytes()


def with_names_of(pretrained: Shapes, source: Source, aliases: Mapping[str, tuple[str, ...]]) -> Source:
    """A source with the names of the pretrained model, which are `aliases` of names that the source may have."""
    shapes = source.shapes()
    foreign = {alias for others in aliases.values() for alias in others if alias in shapes and alias not in pretrained}
    if not foreign:
        return source
    stored = {name: next((alias for alias in others if alias in shapes), None) for name, others in aliases.items()}
    renamed = {name: alias for name, alias in stored.items() if alias is not None}
    return RenamedSource(source, renamed | {name: name for name in shapes if name not in foreign})


# what `upscale` takes as an expert
ExpertSource = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | Source | Callable[[], nn.Module]


def open_source(expert: Any, pretrained: Source, aliases: Mapping[str, tuple[str, ...]] | None = None) -> Source | None:
    """The source of a module, state dict, folder, weight file or name on the hub; None for what is to be loaded first.

    A source is returned as it is. A folder holds a model or a PEFT adapter, and a name on the hub is downloaded. For
    `aliases` see `stored_names`: tensors get the names of the pretrained model. Raises PlanError if a folder or file
    cannot be read.
    """
    source = _open(expert, pretrained, aliases)
    return source and with_names_of(pretrained.shapes(), source, aliases or {})


def _open(expert: Any, pretrained: Source, aliases: Mapping[str, tuple[str, ...]] | None) -> Source | None:
    from .weight_files import ADAPTER_CONFIG, open_weights  # it builds on this module

    if isinstance(expert, (nn.Module, Mapping)):
        return StateDictSource(expert.state_dict() if isinstance(expert, nn.Module) else expert)
    if isinstance(expert, (str, os.PathLike)):
        if isinstance(expert, str):
            from .hub import local_path

            expert = local_path(expert)
        if (Path(expert) / ADAPTER_CONFIG).exists():
            from .adapter_source import AdapterSource  # PEFT takes seconds to import

            return AdapterSource(expert, pretrained)
        return open_weights(expert, like=pretrained.shapes(), aliases=aliases)
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


def stored_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each name of a tensor → the other names under which other models of the same class may hold it.

    These are its `tied_names`, and those of attention that is split in this model; see `split_attention`.
    """
    tied, before = tied_names(model), names_before_splitting(model)
    names = {name: (name, *tied.get(name, ())) for name in (*tied, *before)}
    aliases = {name: (*same[1:], *(before[n] for n in same if n in before)) for name, same in names.items()}
    return {name: others for name, others in aliases.items() if others}
