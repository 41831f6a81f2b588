"""The safetensors files of a model."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..exceptions import CheckpointError, PlanError
from ..nn import ROUTER_NAME
from ..nn.routed import EXPERT_TENSORS
from .file_source import FileSource, TensorHeader
from .sources import Shapes
from .text import shortened

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"


class SafetensorsSource(FileSource):
    """The safetensors files of a model; see `FileSource`."""

    weights_file, index_file = WEIGHTS_FILE, INDEX_FILE

    def _headers(self, file: Path) -> Iterator[TensorHeader]:
        tensors = open_safetensors(file)
        for name in tensors.keys():  # noqa: SIM118  the handle is not a mapping
            part = tensors.get_slice(name)
            yield TensorHeader(name, tuple(part.get_shape()), "F" in part.get_dtype())

    def _open_file(self, file: Path) -> Any:
        return open_safetensors(file)

    def _get_tensor(self, handle: Any, name: str) -> Tensor:
        return handle.get_tensor(name)


def open_safetensors(file: Path) -> Any:
    """`safetensors.safe_open` on the CPU, with a PlanError that names a file that cannot be read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise PlanError(f"{file} can't be read: {shortened(error)}; it is incomplete or corrupt") from None


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


def stored_tensors(folder: Path) -> Shapes:
    """Name → shape of the tensors in the files of a checkpoint, of which only headers are read.

    Raises CheckpointError if a file is missing or cannot be read.
    """
    try:
        return SafetensorsSource(folder).shapes()
    except PlanError as error:
        raise CheckpointError(f"{error}; this is no complete SMILE checkpoint") from None


def check_tensors(
    folder: Path, required: Mapping[str, tuple[int, ...]], aliases: Mapping[str, tuple[str, ...]] | None = None,
    known: Collection[str] = (),
) -> None:  # fmt: skip
    """Raise a CheckpointError if files of a folder lack a tensor, have it in another shape, or hold surplus experts.

    A tensor with `aliases` is stored once, under any of its names. Those called `known` may be stored as well.
    """
    stored = stored_tensors(folder)
    shapes = dict(stored)
    for name, others in (aliases or {}).items():
        found = [other for other in others if other in stored]
        if name in stored and found:
            problem = f"{folder} holds {name} and {found[0]}, which are one tensor in the given model"
            raise CheckpointError(f"{problem}: give the pretrained model that it was built from")
        if found:
            shapes[name] = stored[found[0]]
    missing = [name for name in required if name not in shapes]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(required)} tensors (first: {missing[0]})")
    known = {*required, *(aliases or {}), *known}
    surplus = [name for name in stored if known and name not in known and _belongs_to_experts(name)]
    if surplus:
        problem = f"{folder} holds {len(surplus)} tensors of experts that its config does not describe"
        raise CheckpointError(f"{problem} (first: {surplus[0]}); the file is damaged or was edited: build it again")
    for name, shape in required.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{folder}: {name} has the shape {shapes[name]}, its config says {shape}")


def _belongs_to_experts(name: str) -> bool:
    """Whether the name is one of a routed layer's further tensors, or of the router's."""
    return name.rpartition(".")[2] in EXPERT_TENSORS or ROUTER_NAME in name.split(".")
