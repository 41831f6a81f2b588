"""Factors in eight bits: symmetric quantization of each row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import Storage

LARGEST_INT8 = 127
ROW_TENSORS = ("gate", "down", "up", "dense")  # the tensors of a routed layer that hold factors, row by row


def store_tensors(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """The experts' tensors of one layer; ``"int8"`` replaces `ROW_TENSORS` by integers and adds their scales."""
    if storage == "same":
        return dict(tensors)
    stored = {}
    for name, tensor in tensors.items():
        if name in ROW_TENSORS:
            stored[name], stored[f"{name}_scale"] = quantize_rows(tensor)
        else:
            stored[name] = tensor
    return stored


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows (…, n) to integers from −127 to 127, int8, with scales (…, 1) in the dtype of the rows.

    The error of an entry is at most half a scale: 1/254 of the row's largest entry.
    """
    work, limits = rows.to(torch.promote_types(rows.dtype, torch.float32)), torch.finfo(rows.dtype)
    scale = work.abs().amax(dim=-1, keepdim=True) / LARGEST_INT8
    step = limits.tiny * limits.eps  # of subnormal scales, which are common in float16 and have few digits: rounded up
    stored = torch.where(scale < limits.tiny, torch.ceil(scale / step) * step, scale).to(rows.dtype)
    integers = torch.round(work / stored.to(work).clamp(min=step)).clamp(-LARGEST_INT8, LARGEST_INT8)
    return integers.to(torch.int8), stored
