"""Batches of training examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices (size,) of batches without end; in each epoch all examples come at most once."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)
