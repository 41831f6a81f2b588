"""Linear classification heads, which belong to a task and not to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.framework.task_pools import instantiate_config


class Head(NamedTuple):
    """A linear classifier of C classes on embeddings of size D.

    Attributes:
        weight: (C, D), float32.
        bias: (C,), float32.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def load(cls, file: str | Path) -> Head:
        """Read a head from a safetensors file with the tensors ``weight`` and ``bias``.

        Raises:
            SmileError: naming the file that is missing or has other contents.
        """
        try:
            tensors = load_file(file)
            return cls(tensors["weight"].float(), tensors["bias"].float())
        except (OSError, SafetensorError, KeyError) as error:
            raise SmileError(f"{file} is no classification head with weight and bias: {error}") from None

    def save(self, file: str | Path) -> None:
        """Write the head to a safetensors file, in its dtype."""
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, file)


def load_head(source: Any) -> Head:
    """The head of a file, or of a configuration; a `Head` is returned as it is. Raises SmileError as `Head.load`."""
    return Head.load(source) if isinstance(source, (str, Path)) else instantiate_config(source)
