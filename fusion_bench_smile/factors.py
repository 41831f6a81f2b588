"""Truncated SVD of a delta. Imports torch alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """ΔW ≈ up @ down (arXiv 2408.10174, section 4): `down` has orthonormal rows, the singular values are in `up`.

    Shapes: up (out, r), down (r, in), s (r,), in descending order of s.
    """

    up: Tensor
    down: Tensor
    s: Tensor

    @property
    def rank(self) -> int:
        return self.s.numel()


def truncated_svd(matrix: Tensor, rank: int) -> Factors:
    """The leading `rank` singular triples of a matrix (out, in), fewer where its numerical rank is smaller.

    Directions with s ≤ max(out, in)·eps·s₁ are rounding noise, and are left out: the router must not score an expert
    by arbitrary directions.

    Args:
        matrix: (out, in), of any floating dtype; float16 and bfloat16 are factored in float32.
        rank: the largest rank to keep, at least 1.
    """
    work = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    noise = max(work.shape) * torch.finfo(work.dtype).eps * s[:1]
    kept = min(rank, int((s > noise).sum()))
    return Factors(up=u[:, :kept] * s[:kept], down=vh[:kept].contiguous(), s=s[:kept])
