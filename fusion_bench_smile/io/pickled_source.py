"""Files that `torch.save` wrote: ``pytorch_model.bin`` of older repositories, and ``adapter_model.bin``."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import PlanError
from .file_source import FileSource, TensorHeader
from .text import shortened

PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickledSource(FileSource):
    """The files of a model that `torch.save` wrote; see `FileSource`. Nothing but tensors is unpickled."""

    weights_file, index_file = PICKLED_FILE, PICKLED_INDEX

    def _headers(self, file: Path) -> Iterator[TensorHeader]:
        for name, tensor in open_pickled(file).items():
            yield TensorHeader(name, tuple(tensor.shape), tensor.is_floating_point())

    def _open_file(self, file: Path) -> Any:
        if self._open is not None and self._open[0] == file and not zipfile.is_zipfile(file):
            return self._open[1]  # a file that can't be mapped is in memory
        return open_pickled(file)

    def _get_tensor(self, handle: Any, name: str) -> Tensor:
        return handle[name]


def open_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, which is mapped. Releases of torch before 1.6 wrote files that are read as a whole.

    Raises PlanError, which names the file, if it cannot be read or holds something else than named tensors.
    """
    try:
        state = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # unpickling a damaged file may fail in any way
        problem = shortened(error)
        raise PlanError(f"{file} can't be read: {problem}; it is corrupt, or holds more than tensors") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise PlanError(f"{file} is no state dict of a model; save the model with save_pretrained")
    return state
