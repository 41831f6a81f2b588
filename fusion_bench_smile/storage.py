"""The experts' factors in fewer bytes. Imports torch alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .layers import ROWS, Storage

LARGEST = 127


def as_stored(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """A layer's routed tensors as they are kept: for ``"int8"`` each row as whole numbers, with a scale beside it."""
    if storage == "same":
        return dict(tensors)
    kept = {}
    for name, value in tensors.items():
        if name in ROWS:
            kept[name], kept[f"{name}_scale"] = quantized(value)
        else:
            kept[name] = value
    return kept


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (…, n) as int8 numbers from −127 to 127, and what each row of them is multiplied with: (…, 1).

    The error of an entry is at most half a scale, of a row's largest entry at most 1/254.
    """
    scale = rows.abs().amax(dim=-1, keepdim=True) / LARGEST
    numbers = torch.round(rows / scale.clamp(min=torch.finfo(rows.dtype).tiny)).clamp(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale


def bytes_of(model: torch.nn.Module) -> int:
    """What a model's parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
