"""Truncated SVD of a delta, dense or already factored. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Method = Literal["auto", "exact", "gram", "krylov"]

SOLVER_VERSION = "1"  # part of every stored factor's name: raise it when the numbers change
# below this size of the smaller side LAPACK's own SVD is as fast as anything; from the second one on, Krylov pays
GRAM_FROM, KRYLOV_FROM = 64, 1536
OVERSAMPLING = 8
BLOCK = 16


class Factors(NamedTuple):
    """ΔW ≈ up @ down (arXiv 2408.10174, section 4): `down` has orthonormal rows, the singular values are in `up`.

    Shapes: up (out, r), down (r, in), s (r,), in descending order of s. A truncation is a prefix.
    """

    up: Tensor
    down: Tensor
    s: Tensor

    @property
    def rank(self) -> int:
        return self.s.numel()

    def truncated(self, rank: int) -> Factors:
        """The leading `rank` triples."""
        return Factors(self.up[:, :rank], self.down[:rank], self.s[:rank])


def truncated_svd(matrix: Tensor, rank: int, *, method: Method = "auto", tol: float = 1e-7) -> Factors:
    """The leading `rank` singular triples of a matrix (out, in), fewer where its numerical rank is smaller.

    Directions with s ≤ max(out, in)·eps·s₁ are rounding noise, and are left out: the router must not score an expert
    by arbitrary directions. The result is deterministic; of each right singular vector the largest entry is positive.

    Args:
        matrix: (out, in), of any floating dtype; float16 and bfloat16 are factored in float32.
        rank: the largest rank to keep, at least 1.
        method: ``"exact"``, LAPACK's thin SVD; ``"gram"``, eigenvectors of the smaller Gram matrix, refined;
            ``"krylov"``, block Krylov, which falls back to ``"gram"`` where it doesn't converge; ``"auto"`` chooses by
            size.
        tol: the part of the captured energy Σs² that ``"krylov"`` may miss, and the relative residual from which
            ``"gram"`` falls back to ``"exact"``.

    Raises:
        ValueError: for an unknown method, a rank below 1, or a matrix that is not two-dimensional.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is not one of {', '.join(get_args(Method))}")
    if rank < 1 or matrix.ndim != 2:
        raise ValueError(f"a matrix and a rank of at least 1 are needed, not {tuple(matrix.shape)} and {rank}")
    work = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    rank = min(rank, *work.shape)
    scale = work.abs().max() if work.numel() else work.new_zeros(())
    if not scale:
        return Factors(work.new_zeros(len(work), 0), work.new_zeros(0, work.shape[1]), work.new_zeros(0))
    wide = work.shape[0] < work.shape[1]
    tall = (work.T if wide else work) / scale  # squares of tiny or huge entries would leave the dtype's range
    u, s, v = _solver(method, tall.shape[1], rank)(tall, rank, tol)
    if wide:
        u, v = v, u
    kept = int((s > max(work.shape) * torch.finfo(work.dtype).eps * s[0]).sum())
    return _signed(u[:, :kept], s[:kept] * scale, v[:, :kept])


def low_rank_svd(b: Tensor, a: Tensor, rank: int | None = None) -> Factors:
    """The singular triples of b @ a without forming it: QR of both thin factors, SVD of the small core.

    Args:
        b: (out, r), e.g. LoRA's B times its scaling.
        a: (r, in), LoRA's A.
        rank: the largest rank to keep; None keeps the numerical rank.

    Raises:
        ValueError: for shapes that can't be multiplied.
    """
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"factors of the shapes {tuple(b.shape)} and {tuple(a.shape)} can't be multiplied")
    dtype = torch.promote_types(torch.promote_types(b.dtype, a.dtype), torch.float32)
    (q_out, r_out), (q_in, r_in) = torch.linalg.qr(b.to(dtype)), torch.linalg.qr(a.to(dtype).T)
    core = truncated_svd(r_out @ r_in.T, rank or b.shape[1], method="exact")
    noise = max(len(b), a.shape[1]) * torch.finfo(dtype).eps * core.s[:1]
    kept = int((core.s > noise).sum())
    core = core.truncated(kept)
    return _signed(q_out @ (core.up / core.s), core.s, q_in @ core.down.T)


Triples = tuple[Tensor, Tensor, Tensor]  # u (m, r), s (r,), v (n, r)


def _solver(method: Method, side: int, rank: int) -> Callable[[Tensor, int, float], Triples]:
    if method == "auto":
        large: Method = "krylov" if side >= KRYLOV_FROM and 8 * rank <= side else "gram"
        method = "exact" if side < GRAM_FROM else large
    return {"exact": _exact, "gram": _gram, "krylov": _krylov}[method]


def _exact(tall: Tensor, rank: int, tol: float) -> Triples:
    u, s, vh = torch.linalg.svd(tall, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].mT


def _gram(tall: Tensor, rank: int, tol: float) -> Triples:
    wanted = min(rank + OVERSAMPLING, tall.shape[1])
    vectors = torch.linalg.eigh(tall.mT @ tall).eigenvectors
    u, s, v = _rayleigh_ritz(tall, vectors[:, -wanted:])
    # a Gram matrix holds singular values below √eps·s₁ only as noise: there one more product with WᵀW puts them right
    u, s, v = _rayleigh_ritz(tall, torch.linalg.qr(tall.mT @ u).Q)
    residual = (tall.mT @ u[:, :rank] - v[:, :rank] * s[:rank]).norm()
    if residual > max(tol, 100 * torch.finfo(tall.dtype).eps) ** 0.5 * s.norm():
        return _exact(tall, rank, tol)
    return u[:, :rank], s[:rank], v[:, :rank]


def _rayleigh_ritz(tall: Tensor, basis: Tensor) -> Triples:
    """The best singular triples within the span of an orthonormal basis (n, r) of right vectors."""
    q, r = torch.linalg.qr(tall @ basis)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    return q @ u, s, basis @ vh.mT


def _krylov(tall: Tensor, rank: int, tol: float) -> Triples:
    """Block Golub-Kahan bidiagonalisation with full reorthogonalisation (Musco & Musco, arXiv 1504.05477)."""
    generator = torch.Generator().manual_seed(0)  # drawn on the CPU: the same on every device
    start = torch.randn(tall.shape[1], BLOCK, generator=generator, dtype=tall.dtype).to(tall.device)
    right = [torch.linalg.qr(start).Q]
    products = [tall @ right[0]]  # W times each block of the basis
    largest, energies = min(tall.shape[1] // 2, 16 * rank + 8 * BLOCK), [0.0, 0.0]
    while len(right) * BLOCK < largest:
        basis = torch.cat(right, dim=1)
        block = tall.mT @ torch.linalg.qr(products[-1]).Q
        for _ in range(2):  # once loses orthogonality, twice is enough
            block = block - basis @ (basis.mT @ block)
            block = torch.linalg.qr(block).Q
        right.append(block)
        products.append(tall @ block)
        if len(right) * BLOCK >= rank + OVERSAMPLING and len(right) % 4 == 0:
            energies.append(_energy(torch.cat(products, dim=1), rank))
            if _converged(energies, tol):
                return tuple(part[..., :rank] for part in _rayleigh_ritz(tall, torch.cat(right, dim=1)))  # type: ignore[return-value]
    return _gram(tall, rank, tol)


def _energy(product: Tensor, rank: int) -> float:
    """Σs² of the leading `rank` singular values of W restricted to a basis, from the products with it (m, r)."""
    values = torch.linalg.eigvalsh((product.mT @ product).double())
    return float(values[-rank:].sum())


def _converged(energies: list[float], tol: float) -> bool:
    """Whether what is still missing, extrapolated from the last two gains, is below `tol` of the energy."""
    before, gain = energies[-2] - energies[-3], energies[-1] - energies[-2]
    if energies[-3] <= 0 or gain >= before:
        return False
    return gain * gain / (before - gain) <= tol * energies[-1]


def _signed(u: Tensor, s: Tensor, v: Tensor) -> Factors:
    largest = v.gather(0, v.abs().argmax(dim=0, keepdim=True)) if v.numel() else v.new_ones(1, v.shape[1])
    sign = torch.where(largest < 0, -1.0, 1.0).to(v.dtype)
    return Factors(up=(u * sign * s).contiguous(), down=(v * sign).mT.contiguous(), s=s.contiguous())
