"""Dropped deltas: dense deltas of which a few random entries are kept and rescaled (DARE, arXiv 2311.03099).

The entries of a delta are divided into blocks of equal size, and one entry of each block is kept, times the size of the
block. Its place in the block follows from the index of the block by a fixed hash, so that no positions are stored, and
checkpoints are the same on every device and with every version of torch.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .scoring import is_traced


def num_kept(size: int, density: float) -> int:
    """The number of entries that are kept of `size`: at least one."""
    return min(size, max(1, round(size * density)))


def kept_positions(size: int, count: int, device: torch.device) -> Tensor:
    """The indices of `count` entries that are kept of `size`, one of each block, ascending: (count,), int64."""
    return (_compute_positions if is_traced() else _known_positions)(size, count, device)


def _compute_positions(size: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        bounds = torch.arange(count + 1, device=device) * size // count
        starts, lengths = bounds[:-1], bounds.diff()
        return starts + (_hashed(torch.arange(count, device=device)) * lengths >> 32)


_known_positions = lru_cache(maxsize=64)(_compute_positions)  # a model has few shapes of layers


def _hashed(numbers: Tensor) -> Tensor:
    """The finalizer of MurmurHash3: a bijection of 32-bit numbers that spreads neighbours over the whole range."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = _product(numbers ^ (numbers >> shift), factor)
    return numbers ^ (numbers >> 16)


def _product(numbers: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of products, from halves: 64-bit integers would overflow."""
    low, high = factor & 0xFFFF, factor >> 16
    return numbers * low + ((numbers * high & 0xFFFF) << 16) & 0xFFFFFFFF


def drop(delta: Tensor, density: float) -> Tensor:
    """The kept entries of a delta (out, in), rescaled: (kept,)."""
    count = num_kept(delta.numel(), density)
    kept = delta.flatten().index_select(0, kept_positions(delta.numel(), count, delta.device))
    return kept * (delta.numel() / count)


def restore(kept: Tensor, shape: tuple[int, int]) -> Tensor:
    """Deltas (n, out, in) with the kept entries (n, kept), and zeros elsewhere."""
    size = shape[0] * shape[1]
    deltas = kept.new_zeros(len(kept), size)
    return deltas.index_copy(1, kept_positions(size, kept.shape[1], kept.device), kept).unflatten(1, shape)
