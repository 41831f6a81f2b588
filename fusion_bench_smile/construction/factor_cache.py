"""The factor cache: factors on disk, keyed by the content of the weights. Sweeps and restarts factor nothing twice."""

import logging
import os
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..io import replace_file_atomically, tensor_digest
from .svd import SOLVER_VERSION, Factors

log = logging.getLogger(__name__)

MIN_RANK = 32  # the least rank of an entry: a sweep over smaller ranks factors once, whichever comes first
DEFAULT_MAX_BYTES = 20 * 2**30

_digests: dict[Hashable, str] = {}


def known_digest(identity: Hashable | None, tensor: Callable[[], Tensor]) -> str:
    """The digest of a tensor, read once in the life of this process if it has an identity (see `Source.identity`)."""
    if identity is None:
        return tensor_digest(tensor())
    if identity not in _digests:
        _digests[identity] = tensor_digest(tensor())
    return _digests[identity]


class FactorCache:
    """A folder of factors, one safetensors file for each entry. Several processes may share it.

    A file is written under a temporary name and renamed, and carries a checksum: a damaged one counts as missing. The
    least recently used files are deleted where the folder grows beyond `max_bytes`. The folder is created if it does
    not exist; if it cannot be written, its entries are still used. `hits` and `misses` are the numbers of entries that
    were used and of matrices that were factored.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        self._size: int | None = None
        self._writable = True
        self._lock = threading.Lock()  # of the counts; renaming makes the files safe
        self.hits = self.misses = 0

    def key(self, *content: str) -> str:
        """The name of an entry, by the digests of the tensors that it was computed from."""
        return xxhash.xxh3_128("/".join((*content, SOLVER_VERSION)).encode()).hexdigest()

    def get(self, key: str, rank: int) -> Factors | None:
        """The factors of an entry, truncated to `rank`; None if it is missing, damaged, or of a smaller rank."""
        file = self._folder / f"{key}.safetensors"
        try:
            with safe_open(file, framework="pt") as entry:
                notes = entry.metadata() or {}
                if int(notes.get("rank", 0)) < rank and notes.get("complete") != "yes":
                    return None
                factors = Factors(*(entry.get_tensor(name) for name in Factors._fields))
            if notes.get("checksum") != _checksum(factors):
                raise ValueError("wrong checksum")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("the factor cache's entry %s is damaged (%s): factoring anew", file.name, error)
            return None
        with suppress(OSError):
            os.utime(file)  # the time of use, by which entries are deleted
        with self._lock:
            self.hits += 1
        return factors.truncated(rank)

    def put(self, key: str, factors: Factors, requested_rank: int) -> None:
        """Add an entry. Factors of a smaller rank than the requested one are complete."""
        with self._lock:
            self.misses += 1
        if not self._writable:
            return
        complete = "yes" if factors.rank < requested_rank else "no"
        notes = {"rank": str(requested_rank), "complete": complete, "checksum": _checksum(factors)}
        target = self._folder / f"{key}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replace_file_atomically(target) as scratch:
                save_file({n: t.cpu().contiguous() for n, t in factors._asdict().items()}, scratch, notes)
            with self._lock:
                self._make_room(target.stat().st_size)
        except (OSError, SafetensorError) as error:
            self._writable = False
            log.warning(
                "nothing can be written to the factor cache %s (%s): continuing without it", self._folder, error
            )

    def _make_room(self, added: int) -> None:
        """Delete the least recently used entries above the bound, after one of `added` bytes."""
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
    return "".join(tensor_digest(part) for part in factors)
