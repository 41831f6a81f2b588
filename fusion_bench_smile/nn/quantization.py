"""Factors in few bits: symmetric quantization, in eight bits with one scale a row, in four with one a group.

In four bits two values share a byte, and the scales are the bits of bfloat16 numbers: tensors of integers, which keep
their size when a model is cast to another dtype.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Storage

LARGEST_INT8, LARGEST_INT4 = 127, 7
GROUP = 64  # values of a row that share a scale in four bits
ROW_TENSORS = ("gate", "down", "up", "dense")  # the tensors of a routed layer that hold factors, row by row


def store_tensors(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """The experts' tensors of one layer as they are stored: integers and their scales in the place of `ROW_TENSORS`."""
    if storage == "same":
        return dict(tensors)
    quantize, stored = quantize_rows if storage == "int8" else quantize_groups, {}
    for name, tensor in tensors.items():
        if name in ROW_TENSORS:
            stored[name], stored[f"{name}_scale"] = quantize(tensor)
        else:
            stored[name] = tensor
    return stored


def stored_rows(
    rows: tuple[int, ...], storage: Storage, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:  # fmt: skip
    """Shape and dtype of the tensors that hold rows of shape (…, n): of ``values``, and of their ``scales``."""
    *leading, size = rows
    if storage == "same":
        return {"values": (rows, dtype)}
    if storage == "int8":
        return {"values": (rows, torch.int8), "scales": ((*leading, 1), dtype)}
    return {
        "values": ((*leading, -(-size // 2)), torch.uint8),
        "scales": ((*leading, -(-size // GROUP)), torch.int16),
    }


def row_size(size: int, storage: Storage, dtype: torch.dtype, in_bytes: bool) -> int:
    """What one row of n values takes: its bytes, or the number of its values and scales."""
    stored = stored_rows((size,), storage, dtype)
    if in_bytes:
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in stored.values())
    return size + (torch.Size(stored["scales"][0]).numel() if "scales" in stored else 0)


def largest_rounded(rows: Tensor, storage: Storage) -> Tensor:
    """Rows, larger by what rounding scales may add: they are infinite where a stored row would be."""
    if storage == "same":
        return rows
    eps = torch.finfo(rows.dtype if storage == "int8" else torch.bfloat16).eps
    rounded = rows * (1 + eps)
    return rounded.float() if storage == "int4" and rows.dtype == torch.float64 else rounded


def dequantized(values: Tensor, scales: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The rows (…, n) of quantized ones, in a dtype."""
    if values.dtype == torch.int8:
        return values.to(dtype) * scales.to(dtype)
    pairs = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)  # (…, n) or (…, n + 1), from 1 to 15
    if padding := scales.shape[-1] * GROUP - pairs.shape[-1]:
        pairs = F.pad(pairs, (0, padding))
    groups = pairs.float().sub_(LARGEST_INT4 + 1).unflatten(-1, (-1, GROUP))  # (…, groups, 64)
    return groups.mul_(scales.view(torch.bfloat16).float()[..., None]).flatten(-2)[..., :size].to(dtype)


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


def quantize_groups(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows (…, n) to integers from −7 to 7, in groups of 64 values with a scale each.

    The error of an entry is at most half a scale, 1/14 of its group's largest entry, with the rounding of the scale.

    Returns:
        Two values in a byte, uint8 (…, ⌈n/2⌉), and the bits of scales in bfloat16, int16 (…, ⌈n/64⌉).
    """
    size, work = rows.shape[-1], rows.to(torch.float32)
    groups = F.pad(work, (0, -size % GROUP)).unflatten(-1, (-1, GROUP))  # (…, groups, 64)
    largest, tiny = groups.abs().amax(dim=-1), torch.finfo(torch.float32).tiny  # subnormal scales have few digits
    scales = (largest / LARGEST_INT4).clamp(min=tiny).mul(largest > 0).to(torch.bfloat16)  # (…, groups)
    steps = scales.float().clamp(min=tiny)[..., None]
    integers = torch.round(groups / steps).clamp(-LARGEST_INT4, LARGEST_INT4).flatten(-2)[..., : size + size % 2]
    pairs = (integers.to(torch.int16) + LARGEST_INT4 + 1).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, scales.view(torch.int16)
