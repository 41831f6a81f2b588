"""The version of stored tensors: whether what was computed from them is still right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .scoring import is_traced


class Version(NamedTuple):
    """What a value was computed from. Two versions are equal if no tensor was changed, cast, moved or replaced."""

    storages: tuple[StorageWeakRef, ...]  # an address is used again, but not while there is a weak reference
    tensors: tuple[object, ...]
    kinds: tuple[object, ...]


def version_of(tensors: Iterable[Tensor | None], *kinds: object) -> Version | None:
    """The version of tensors and of other values that a result depends on.

    None where it is unknown: to a compiler, and for tensors of inference mode, which count no changes.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if is_traced() or any(tensor.is_inference() or tensor.is_meta for tensor in given):
        return None
    storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in given)
    described = tuple((id(t), t._version, t.storage_offset(), t.stride(), t.dtype, t.device) for t in given)
    return Version(storages, described, kinds)
