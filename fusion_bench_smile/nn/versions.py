"""The version of stored tensors: whether what was computed from them is still right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .scoring import is_traced


class Version(NamedTuple):
    """What a value was computed from: equal versions say that no tensor was changed, cast, moved or replaced.

    Changes through ``tensor.data`` are not counted by torch, nor are those of fused optimizers. While a tensor has a
    gradient, its version is unknown for that reason.
    """

    storages: tuple[StorageWeakRef, ...]  # an address is used again, but not while there is a weak reference
    tensors: tuple[object, ...]
    kinds: tuple[object, ...]


def version_of(tensors: Iterable[Tensor | None], *kinds: object) -> Version | None:
    """The version of tensors and of other values that a result depends on.

    None where it is unknown: to a compiler, while they are trained, and for tensors of inference mode, which count no
    changes, of the meta device and of transformed functions, which have no storage.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if is_traced() or any(t.is_inference() or t.is_meta or (t.is_leaf and t.grad is not None) for t in given):
        return None
    try:
        storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in given)
    except (NotImplementedError, RuntimeError):
        return None
    return Version(storages, tuple(map(_described, given)), kinds)


def is_version_of(version: Version, tensors: Iterable[Tensor | None]) -> bool:
    """Whether tensors still have a version, which is faster than to compare it with `version_of`."""
    given = [tensor for tensor in tensors if tensor is not None]
    return len(given) == len(version.tensors) and all(
        tensor.untyped_storage()._cdata == storage.cdata
        and _described(tensor) == described
        and not (tensor.is_leaf and tensor.grad is not None)
        for tensor, storage, described in zip(given, version.storages, version.tensors, strict=True)
    )


def _described(tensor: Tensor) -> tuple[object, ...]:
    return id(tensor), tensor._version, tensor.storage_offset(), tensor.stride(), tensor.dtype, tensor.device
