"""The safetensors files of a model."""

import json
import math
import os
import threading
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..exceptions import CheckpointError, PlanError
from .names import name_problem, shortened
from .schema import read_json
from .sources import Shapes, Source

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_MAPPED_BYTES = 16 * 2**20


class SafetensorsSource(Source):
    """The safetensors files of a folder, single or sharded, or one such file.

    An open memory map keeps all pages that were read through it in memory, while opening a file for each small tensor
    of an adapter takes longer than factoring it. The map is renewed after `MAX_MAPPED_BYTES`.

    Args:
        dtypes: Name → dtype that a tensor is converted to when read, as loading the model in half precision would.
        like: The shapes of the pretrained model. Tensors that ``from_pretrained`` of its class would ignore are left
            out: other components (a text tower beside the vision tower) and old integer buffers.
        aliases: Name of a tied tensor → the names under which it may be stored instead.

    Raises:
        PlanError: A file is missing, incomplete or corrupt; it is named.
    """

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
        for file in weight_files(Path(path)):
            tensors = open_safetensors(file)
            for name in tensors.keys():  # noqa: SIM118  the handle is not a mapping
                part = tensors.get_slice(name)
                ignored = name.split(".")[0] not in components or "F" not in part.get_dtype()
                if like is None or name in like or not ignored:
                    self._shapes[name], self._locations[name] = tuple(part.get_shape()), (file, name)
        for name, others in (aliases or {}).items():
            stored = next((other for other in others if other in self._shapes), None)
            if name not in self._shapes and stored is not None:
                self._shapes[name], self._locations[name] = self._shapes[stored], self._locations[stored]

    def shapes(self) -> Shapes:
        """See `Source.shapes`."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        file, stored_name = self._locations[name]
        with self._lock:
            if self._open is None or self._open[0] != file or self._mapped_bytes > MAX_MAPPED_BYTES:
                self._open, self._mapped_bytes = (file, open_safetensors(file)), 0
            tensor = self._open[1].get_tensor(stored_name)
            self._mapped_bytes += tensor.nbytes
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def identity(self, name: str) -> Hashable:
        """The file, its size and time of change, the tensor's name and dtype."""
        file, stored_name = self._locations[name]
        stat = file.stat()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stored_name, self._dtypes.get(name)

    def stamp(self) -> Hashable | None:
        """The names of the tensors, their dtypes, and the inode, size and time of change of each file.

        Processes on several machines that read one file from a shared file system get the same.
        """
        files = {file: file.stat() for file in sorted({file for file, _ in self._locations.values()})}
        stats = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in files.values())
        numbers = {file: number for number, file in enumerate(files)}
        names = tuple((name, numbers[file], stored) for name, (file, stored) in sorted(self._locations.items()))
        return stats, names, tuple(sorted((name, str(dtype)) for name, dtype in self._dtypes.items()))


def open_safetensors(file: Path) -> Any:
    """`safetensors.safe_open` on the CPU, with a PlanError that names a file that cannot be read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise PlanError(f"{file} can't be read: {shortened(error)}; it is incomplete or corrupt") from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, or `path` if it is a file; PlanError if they are missing or incomplete."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PlanError(f"the folder {path} does not exist; correct its path")
    if (path / INDEX_FILE).exists():
        files = sorted({path / name for name in _indexed_files(path / INDEX_FILE)})
    elif (path / WEIGHTS_FILE).exists():
        files = [path / WEIGHTS_FILE]
    else:
        raise PlanError(f"{path} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; save the model with save_pretrained")
    for file in files:
        if not file.exists():
            raise PlanError(f"{path} lacks {file.name}, which its index names: the checkpoint is incomplete")
    return files


def _indexed_files(index: Path) -> set[str]:
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


def flatten_tensor(folder: Path, name: str) -> bool:
    """Give a tensor in the safetensors files of a folder one dimension, in the header alone; whether it was found."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            if name in header:
                header[name]["shape"] = [math.prod(header[name]["shape"])]
                file.seek(8)  # the new header is shorter, and the data must stay where they are
                file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))
                return True
    return False


def check_tensors(
    folder: Path, required: Mapping[str, tuple[int, ...]], aliases: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Raise a CheckpointError if files of a folder lack a tensor or have it in another shape. Only headers are read.

    A tensor with `aliases` is stored once, under any of its names.
    """
    try:
        stored, shapes = SafetensorsSource(folder).shapes(), SafetensorsSource(folder, aliases=aliases).shapes()
    except PlanError as error:
        raise CheckpointError(f"{error}; this is no complete SMILE checkpoint") from None
    for name, others in (aliases or {}).items():
        if name in stored and (twice := [other for other in others if other in stored]):
            problem = f"{folder} holds {name} and {twice[0]}, which are one tensor in the given model"
            raise CheckpointError(f"{problem}: give the pretrained model that it was built from")
    missing = [name for name in required if name not in shapes]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(required)} tensors (first: {missing[0]})")
    for name, shape in required.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{folder}: {name} has the shape {shapes[name]}, its config says {shape}")
