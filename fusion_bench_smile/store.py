"""The factor store: factors on disk, found by what they were made of. Sweeps and restarts factor nothing twice."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .factors import SOLVER_VERSION, Factors

log = logging.getLogger(__name__)

# Entries hold at least this rank: a sweep over smaller ones factors once, whatever point comes first.
SMALLEST_RANK = 32
DEFAULT_BYTES = 20 * 2**30


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    head = f"{data.dtype}{tuple(data.shape)}".encode()
    return xxhash.xxh3_128(
        data.reshape(-1).view(torch.uint8).numpy().data, seed=xxhash.xxh32_intdigest(head)
    ).hexdigest()


_digests: dict[Hashable, str] = {}


def known_digest(identity: Hashable | None, tensor: Callable[[], Tensor]) -> str:
    """The digest of a tensor; one that has an identity is read once in this process, however long the sweep."""
    if identity is None:
        return digest(tensor())
    if identity not in _digests:
        _digests[identity] = digest(tensor())
    return _digests[identity]


class FactorStore:
    """A folder of factors, one safetensors file for each; several processes may share it.

    A file is written under a temporary name and renamed, and carries a checksum: one that is damaged counts as missing.
    What was used longest ago is deleted where the folder grows beyond its bound.

    Args:
        folder: made where it doesn't exist. If it can't be written, what can be read is used all the same.
        max_bytes: the bound.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_BYTES) -> None:
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        self._size: int | None = None
        self._writable = True
        self._lock = threading.Lock()  # of the counts; the files are safe by being renamed
        self.hits = self.misses = 0

    def key(self, *parts: str) -> str:
        """The name of an entry: what it was made of, e.g. the digests of two tensors."""
        return xxhash.xxh3_128("/".join((*parts, SOLVER_VERSION)).encode()).hexdigest()

    def get(self, key: str, rank: int) -> Factors | None:
        """The factors of an entry, truncated to `rank`; None where it is missing, damaged, or of a smaller rank."""
        factors = self._read(self._folder / f"{key}.safetensors", rank)
        with self._lock:
            self.hits += factors is not None
        return factors

    def _read(self, file: Path, rank: int) -> Factors | None:
        try:
            with safe_open(file, framework="pt") as entry:
                notes = entry.metadata() or {}
                if int(notes.get("rank", 0)) < rank and notes.get("complete") != "yes":
                    return None
                factors = Factors(*(entry.get_tensor(name) for name in Factors._fields))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("the factor store's entry %s is damaged (%s): factoring anew", file.name, error)
            return None
        if notes.get("checksum") != _checksum(factors):
            log.warning("the factor store's entry %s is damaged (wrong checksum): factoring anew", file.name)
            return None
        with suppress(OSError):
            os.utime(file)  # used now: the last to be deleted
        return factors.truncated(rank)

    def put(self, key: str, factors: Factors, asked: int) -> None:
        """Keep factors that were asked for at rank `asked`; fewer than that means there are no more."""
        with self._lock:
            self.misses += 1
        if not self._writable:
            return
        notes = {
            "rank": str(asked),
            "complete": "yes" if factors.rank < asked else "no",
            "checksum": _checksum(factors),
        }
        scratch = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=key, suffix=".part", dir=self._folder)
            os.close(handle)
            save_file({n: t.cpu().contiguous() for n, t in factors._asdict().items()}, scratch, notes)
            target = self._folder / f"{key}.safetensors"
            os.replace(scratch, target)
            with self._lock:
                self._make_room(target.stat().st_size)
        except (OSError, SafetensorError) as error:
            self._writable = False
            log.warning("nothing can be written to the factor store %s (%s): going on without", self._folder, error)
            if scratch:
                with suppress(OSError):
                    os.unlink(scratch)

    def _make_room(self, added: int) -> None:
        self._size = None if self._size is None else self._size + added
        if self._size is not None and self._size <= self._max_bytes:
            return
        entries = []
        for file in self._folder.glob("*.safetensors"):
            with suppress(OSError):  # another process may have deleted it
                stat = file.stat()
                entries.append((stat.st_mtime, stat.st_size, file))
        self._size = sum(size for _, size, _ in entries)
        for _, size, file in sorted(entries):
            if self._size <= self._max_bytes:
                break
            with suppress(OSError):
                file.unlink()
            self._size -= size


def _checksum(factors: Factors) -> str:
    return "".join(digest(part) for part in factors)
