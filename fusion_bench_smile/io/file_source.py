"""The weight files of a model, read tensor by tensor. The formats are subclasses."""

import os
import threading
from collections.abc import Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..exceptions import CheckpointError, PlanError
from .names import name_problem
from .schema import read_json
from .sources import Shapes, Source
from .text import shortened

MAX_MAPPED_BYTES = 16 * 2**20


class TensorHeader(NamedTuple):
    """What a file says of one tensor."""

    name: str
    shape: tuple[int, ...]
    is_floating_point: bool


class FileSource(Source):
    """The weight files of a folder, single or sharded, or one such file.

    An open memory map keeps all pages that were read through it in memory, while opening a file for each small tensor
    of an adapter takes longer than factoring it. The map is renewed after `MAX_MAPPED_BYTES`.

    Args:
        dtypes: Name → dtype that a tensor is converted to when read, as loading the model in half precision would.
        like: The shapes of the pretrained model. Tensors that ``from_pretrained`` of its class would ignore are left
            out: other components (a text tower beside the vision tower) and old integer buffers. If the files are
            those of a model with a head, the names of the model inside it lose their prefix (``transformer.``).
        aliases: Name of a tied tensor → the names under which it may be stored instead.

    Raises:
        PlanError: A file is missing, incomplete or corrupt; it is named.
    """

    weights_file: ClassVar[str]  # name of the single file
    index_file: ClassVar[str]  # name of the index of sharded files

    def __init__(
        self, path: str | os.PathLike[str], dtypes: Mapping[str, torch.dtype] | None = None,
        like: Shapes | None = None, aliases: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:  # fmt: skip
        self._dtypes = dtypes or {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._locations: dict[str, tuple[Path, str]] = {}  # name → file, and the name in it
        self._open: tuple[Path, Any] | None = None
        self._mapped_bytes, self._lock = 0, threading.Lock()
        components = {name.split(".")[0] for name in like or ()}
        files = weight_files(Path(path), self.weights_file, self.index_file)
        headers = [(file, header) for file in files for header in self._headers(file)]
        prefix = prefix_of_base({header.name for _, header in headers}, like or {})
        for file, (stored_name, shape, is_floating_point) in headers:
            name = stored_name.removeprefix(prefix)
            ignored = name.split(".")[0] not in components or not is_floating_point
            if like is None or name in like or not ignored:
                self._shapes[name], self._locations[name] = shape, (file, stored_name)
        for name, others in (aliases or {}).items():
            stored = next((other for other in others if other in self._shapes), None)
            if name not in self._shapes and stored is not None:
                self._shapes[name], self._locations[name] = self._shapes[stored], self._locations[stored]

    def _headers(self, file: Path) -> Iterator[TensorHeader]:
        """All tensors of a file, without their data."""
        raise NotImplementedError

    def _open_file(self, file: Path) -> Any:
        """A handle for `_get_tensor`, which maps the file."""
        raise NotImplementedError

    def _get_tensor(self, handle: Any, name: str) -> Tensor:
        raise NotImplementedError

    def total_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in {file for file, _ in self._locations.values()})

    def shapes(self) -> Shapes:
        """See `Source.shapes`."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        file, stored_name = self._locations[name]
        with self._lock:
            if self._open is None or self._open[0] != file or self._mapped_bytes > MAX_MAPPED_BYTES:
                self._open, self._mapped_bytes = (file, self._open_file(file)), 0
            try:
                tensor = self._get_tensor(self._open[1], stored_name)
            except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
                raise PlanError(f"{file}: {name} can't be read: {shortened(error)}; it is corrupt") from None
            self._mapped_bytes += tensor.nbytes
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def identity(self, name: str) -> Hashable:
        """The file, its size and time of change, the tensor's name and dtype."""
        file, stored_name = self._locations[name]
        stat = file.stat()
        return stat.st_dev, file_version(stat), stored_name, self._dtypes.get(name)

    def stamp(self) -> Hashable | None:
        """The names of the tensors, their dtypes, and the inode, size and time of change of each file.

        Processes on several machines that read one file from a shared file system get the same.
        """
        files = {file: file.stat() for file in sorted({file for file, _ in self._locations.values()})}
        stats = tuple(map(file_version, files.values()))
        numbers = {file: number for number, file in enumerate(files)}
        names = tuple((name, numbers[file], stored) for name, (file, stored) in sorted(self._locations.items()))
        return stats, names, tuple(sorted((name, str(dtype)) for name, dtype in self._dtypes.items()))


def file_version(status: os.stat_result) -> tuple[int, int, int]:
    """What identifies the content of a file without reading it: inode, size, time of change in ns."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def prefix_of_base(names: Collection[str], like: Collection[str]) -> str:
    """What precedes the names of a model in the files of one that holds it, with a dot; empty where nothing does."""
    found = {name.partition(".")[0] for name in names if name.partition(".")[2] in like}
    return f"{found.pop()}." if len(found) == 1 and not any(name in like for name in names) else ""


def weight_files(path: Path, weights_file: str, index_file: str) -> list[Path]:
    """The files with such names in a folder, or `path` if it is a file; PlanError if one is missing."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PlanError(f"the folder {path} does not exist; correct its path")
    if (path / index_file).exists():
        files = sorted({path / name for name in indexed_files(path / index_file)})
    elif (path / weights_file).exists():
        files = [path / weights_file]
    else:
        raise PlanError(f"{path} holds neither {weights_file} nor {index_file}; save the model with save_pretrained")
    for file in files:
        if not file.exists():
            raise PlanError(f"{path} lacks {file.name}, which its index names: the checkpoint is incomplete")
    return files


def indexed_files(index: Path) -> set[str]:
    """The names of the files in an index. PlanError for one that is damaged, or names a file in another folder."""
    try:
        weight_map = read_json(index).get("weight_map")
    except CheckpointError as error:
        raise PlanError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlanError(f"{index} lists no files; save the model again")
    for name in weight_map.values():
        if problem := name_problem(name):
            raise PlanError(f"{index}: the file's name {problem}; save the model again")
    return set(weight_map.values())
