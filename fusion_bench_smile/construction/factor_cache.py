"""The factor cache: factors on disk, keyed by the content of the weights. Sweeps and restarts factor nothing twice."""

import logging
import os
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..io import remove_leftovers, replace_file_atomically, tensor_digest
from .svd import SOLVER_VERSION, Factors

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 20 * 2**30
CHECKSUM = "checksum"  # the tensor beside those of the factors

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

    A file is written under a temporary name and renamed, and carries a checksum of its name and of all its tensors: a
    damaged one counts as missing. The least recently used files are deleted where the folder grows beyond `max_bytes`.
    The folder is created if it does not exist; if it cannot be written, its entries are still used. `hits` and `misses`
    are the numbers of entries that were used and of matrices that were factored.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        self._size: int | None = None
        self._writable = True
        self._lock = threading.Lock()  # of the counts; renaming makes the files safe
        self.hits = self.misses = 0

    def key(self, *content: str, device: torch.device) -> str:
        """The name of an entry.

        Args:
            content: The digests of the tensors that the factors are computed from, and to which dtype and rank. What
                the rounding depends on is added, so that an entry holds the bits that factoring anew would give.
            device: Where the factors are computed.
        """
        return xxhash.xxh3_128("/".join((*content, SOLVER_VERSION, _arithmetic(device))).encode()).hexdigest()

    def get(self, key: str) -> Factors | None:
        """The factors of an entry; None if it is missing or damaged."""
        file = self._folder / f"{key}.safetensors"
        try:
            factors = _parse(file.read_bytes(), key)  # at once: another process may delete the file at any time
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            log.warning("the factor cache's entry %s is damaged (%s): factoring anew", file.name, error)
            return None
        with suppress(OSError):
            os.utime(file)  # the time of use, by which entries are deleted
        with self._lock:
            self.hits += 1
        return factors

    def put(self, key: str, factors: Factors) -> None:
        """Add an entry."""
        with self._lock:
            self.misses += 1
        if not self._writable:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in factors._asdict().items()}
        checksum = torch.tensor(list(_checksum(key, Factors(**tensors))), dtype=torch.uint8)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replace_file_atomically(self._folder / f"{key}.safetensors") as scratch:
                save_file({**tensors, CHECKSUM: checksum}, scratch)
                size = scratch.stat().st_size
            with self._lock:
                self._make_room(size)
        except (OSError, SafetensorError) as error:
            self._writable = False
            log.warning(
                "nothing can be written to the factor cache %s (%s): continuing without it", self._folder, error
            )

    def _make_room(self, added: int) -> None:
        """Delete the least recently used entries above the bound, after one of `added` bytes."""
        if self._size is None:  # the first entry of this process
            remove_leftovers(self._folder)
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


def _parse(data: bytes, key: str) -> Factors:
    """The factors in a file. Raises a ValueError, or an error of safetensors or torch, if it is not as written."""
    tensors = load(data)
    checksum = tensors.pop(CHECKSUM)
    factors = Factors(**tensors)
    if checksum.numpy().tobytes() != _checksum(key, factors):
        raise ValueError("wrong checksum")
    return factors


def _checksum(key: str, factors: Factors) -> bytes:
    """A checksum of an entry's name and of the dtype, shape and bytes of each tensor: 16 bytes."""
    return xxhash.xxh3_128_digest("/".join((key, *map(tensor_digest, factors))).encode())


def _arithmetic(device: torch.device) -> str:
    """What the rounding depends on beside the numbers: releases, kind of processor, precision, threads of a worker."""
    is_cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability()
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    return "/".join((torch.__version__, device.type, processor, precision, str(threads)))
