"""Truncated SVD of a delta, dense or factored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Method = Literal["auto", "exact", "gram", "krylov"]

SOLVER_VERSION = "3"  # part of every cache key: raise it when the numbers change
MIN_GRAM_SIDE = 64  # below this size of the smaller side LAPACK's SVD is as fast as the other methods
OVERSAMPLING = 8
BLOCK = 16
CLUSTER = 12  # BLOCK consecutive Ritz values are resolved if they differ by this many residuals


class Factors(NamedTuple):
    """Factors of a matrix, ΔW ≈ up @ down (arXiv 2408.10174, section 4); s descends, and a truncation is a prefix."""

    up: Tensor  # (out, r), left singular vectors times singular values
    down: Tensor  # (r, in), right singular vectors, orthonormal rows
    s: Tensor  # (r,), singular values
    norm: Tensor  # (), the Frobenius norm ‖ΔW‖, of all directions, kept or not

    @property
    def rank(self) -> int:
        """r."""
        return self.s.numel()

    def truncated(self, rank: int) -> Factors:
        """The leading `rank` singular triples."""
        return Factors(self.up[:, :rank], self.down[:rank], self.s[:rank], self.norm)

    def to(self, device: torch.device) -> Factors:
        """The factors on a device."""
        return Factors(*(tensor.to(device) for tensor in self))

    def energy(self, rank: int) -> float:
        """The share of ‖ΔW‖² that the leading `rank` directions hold."""
        return float((self.s[:rank] / self.norm).square().sum())


def truncated_svd(matrix: Tensor, rank: int, *, method: Method = "auto", tol: float = 1e-6) -> Factors:
    """The leading singular triples of a matrix (out, in); float16 and bfloat16 are factored in float32.

    Directions with s ≤ max(out, in)·eps·s₁ are rounding noise and are left out: the router must not score an expert by
    arbitrary directions. The result is deterministic; the largest entry of each right singular vector is positive.

    Args:
        matrix: Of any floating dtype.
        rank: The largest rank to keep, at least 1. The numerical rank of the matrix may be smaller.
        method: ``"exact"``, LAPACK's thin SVD; ``"gram"``, refined eigenvectors of the smaller Gram matrix;
            ``"krylov"``, block Lanczos; ``"auto"`` chooses by size. Where a residual is too large, ``"krylov"`` falls
            back to ``"gram"``, and ``"gram"`` to ``"exact"``.
        tol: The square of the largest relative residual ‖Wᵀu − s·v‖/s of a triple: about the share of the captured
            energy Σs² that may be missed.

    Raises:
        ValueError: The method is unknown, the rank is below 1, or the matrix is not two-dimensional or not finite.
        torch.linalg.LinAlgError: LAPACK fails, in float64 too.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is not one of {', '.join(get_args(Method))}")
    if rank < 1 or matrix.ndim != 2:
        raise ValueError(f"a matrix and a rank of at least 1 are needed, not {tuple(matrix.shape)} and {rank}")
    work = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    rank = min(rank, *work.shape)
    scale = work.abs().max() if work.numel() else work.new_zeros(())
    if not torch.isfinite(scale):
        raise ValueError("the matrix holds NaN or infinity, or its entries are too large for its dtype")
    if not scale:
        return _signed(work.new_zeros(len(work), 0), work.new_zeros(0), work.new_zeros(work.shape[1], 0), scale)
    wide = work.shape[0] < work.shape[1]
    # products with a row-major matrix are the fastest, and the layout must not change the rounding; squares of tiny or
    # huge entries would leave the dtype's range
    tall = (work.mT if wide else work).clone(memory_format=torch.contiguous_format).div_(scale)
    u, s, v = _triples(method, tall, rank, tol)
    if wide:
        u, v = v, u
    kept = int((s > max(work.shape) * torch.finfo(work.dtype).eps * s[0]).sum())
    return _signed(u[:, :kept], s[:kept] * scale, v[:, :kept], _norm(tall).to(s) * scale)


def low_rank_svd(b: Tensor, a: Tensor, rank: int | None = None) -> Factors:
    """The singular triples of b @ a without forming the product: QR of both thin factors, SVD of the small core.

    For LoRA, `b` (out, r) is B times its scaling, and `a` (r, in) is A. A `rank` of None keeps the numerical rank.
    Raises ValueError if the shapes cannot be multiplied.
    """
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"factors of the shapes {tuple(b.shape)} and {tuple(a.shape)} can't be multiplied")
    dtype = torch.promote_types(torch.promote_types(b.dtype, a.dtype), torch.float32)
    (q_out, r_out), (q_in, r_in) = torch.linalg.qr(b.to(dtype)), torch.linalg.qr(a.to(dtype).T)
    core = truncated_svd(r_out @ r_in.T, rank or b.shape[1], method="exact")
    noise = max(len(b), a.shape[1]) * torch.finfo(dtype).eps * core.s[:1]
    core = core.truncated(int((core.s > noise).sum()))
    return _signed(q_out @ (core.up / core.s), core.s, q_in @ core.down.T, core.norm)


Triples = tuple[Tensor, Tensor, Tensor]  # u (m, r), s (r,), v (n, r)


def _triples(method: Method, tall: Tensor, rank: int, tol: float) -> Triples:
    """Those of a method; where LAPACK does not converge, those of its SVD in float64."""
    try:
        return _solver(method, tall.shape[1], rank)(tall, rank, tol)
    except torch.linalg.LinAlgError:
        u, s, v = _exact(tall.double(), rank, tol)
        return u.to(tall.dtype), s.to(tall.dtype), v.to(tall.dtype)


def _solver(method: Method, side: int, rank: int) -> Callable[[Tensor, int, float], Triples]:
    if method == "auto":
        large: Method = "krylov" if side >= 8 * rank + 256 else "gram"
        method = "exact" if side < MIN_GRAM_SIDE else large
    return {"exact": _exact, "gram": _gram, "krylov": _krylov}[method]


def _exact(tall: Tensor, rank: int, tol: float) -> Triples:
    u, s, vh = torch.linalg.svd(tall, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].mT


def _gram(tall: Tensor, rank: int, tol: float) -> Triples:
    wanted = min(rank + OVERSAMPLING, tall.shape[1])
    basis = torch.linalg.eigh(tall.mT @ tall).eigenvectors[:, -wanted:]
    triples, residual = _refined(tall, basis, rank, enough=1e3 * torch.finfo(tall.dtype).eps)
    return triples if residual <= tol**0.5 else _exact(tall, rank, tol)


def _refined(tall: Tensor, basis: Tensor, rank: int, enough: float) -> tuple[Triples, float]:
    """The best triples within an orthonormal basis (n, r) that nearly spans the leading right singular vectors.

    In a Gram matrix, singular values below √eps·s₁ are noise. Where a residual is above `enough`, one more product with
    WᵀW corrects them. The largest residual, ‖Wᵀu − s·v‖ / max(s, √eps·s₁), is returned too.
    """
    for refinements_left in (1, 0):
        q, r = torch.linalg.qr(tall @ basis)
        u, s, vh = torch.linalg.svd(r, full_matrices=False)
        u, v = q @ u, basis @ vh.mT
        back = tall.mT @ u
        floor = torch.finfo(tall.dtype).eps ** 0.5 * s[:1]
        residual = float(((back - v * s).norm(dim=0) / torch.maximum(s, floor))[:rank].max())
        if residual <= enough or not refinements_left:
            break
        basis = torch.linalg.qr(back).Q
    return (u[:, :rank], s[:rank], v[:, :rank]), residual


def _krylov(tall: Tensor, rank: int, tol: float) -> Triples:
    """Block Lanczos, with a deflated second run for singular values that are too small beside the largest ones."""
    leading = _lanczos(tall, rank, tol)
    if leading is None:
        return _gram(tall, rank, tol)
    u, s, v = leading
    if len(s) == rank:
        return leading
    rest = tall - (u * s) @ v.mT
    if _norm(rest) <= max(tall.shape) * torch.finfo(tall.dtype).eps * s[0]:
        return leading  # the numerical rank is smaller than the requested one
    basis = torch.linalg.qr(torch.cat([v, _krylov(rest, rank - len(s), tol)[2]], dim=1)).Q
    triples, residual = _refined(tall, basis, rank, enough=tol**0.5)
    return triples if residual <= tol**0.5 else _gram(tall, rank, tol)


def _lanczos(tall: Tensor, rank: int, tol: float) -> Triples | None:
    """Block Lanczos on WᵀW with full reorthogonalisation (the block Krylov method of arXiv 1504.05477).

    The projection H of WᵀW on the basis consists of the coefficients of the reorthogonalisation. The coupling of the
    last block with the next one gives the residual of every Ritz pair without another product. Returned are those of
    the leading `rank` triples that WᵀW resolves (s above about 0.02·s₁ in float32). None if they do not converge, or
    if others may have been missed: a start of BLOCK columns spans at most BLOCK directions of an eigenspace, and of a
    cluster of singular values that the residuals do not resolve.
    """
    side, eps = tall.shape[1], torch.finfo(tall.dtype).eps
    if side < 3 * BLOCK:
        return None
    largest = min(2 * side // 3, 16 * rank + 24 * BLOCK) // BLOCK * BLOCK
    basis, h = tall.new_empty(side, largest + BLOCK), tall.new_zeros(largest, largest)
    generator = torch.Generator().manual_seed(0)  # drawn on the CPU: the same on every device
    start = torch.randn(side, BLOCK, generator=generator, dtype=tall.dtype).to(tall.device)
    basis[:, :BLOCK] = torch.linalg.qr(start).Q
    check, energy, limit = 4 * rank + 4 * BLOCK, _norm(tall).square(), tol**0.5
    for end in range(BLOCK, largest + 1, BLOCK):
        previous, last = basis[:, :end], slice(end - BLOCK, end)
        block = tall.mT @ (tall @ basis[:, last])
        h[:end, last] = previous.mT @ block
        h[last, :end] = h[:end, last].mT
        basis[:, end : end + BLOCK], coupling = _orthogonalized(block - previous @ h[:end, last], previous)
        invariant = coupling.norm() <= 10 * eps * h[:BLOCK, :BLOCK].norm()
        if end < min(check, largest) and not invariant:
            continue
        values, vectors = torch.linalg.eigh(h[:end, :end])
        resolved = int((values[-rank:] > 3e3 * eps * values[-1]).sum())
        worst = float(((coupling @ vectors[-BLOCK:, -resolved:]).norm(dim=0) / values[-resolved:]).max())
        spread = _least_spread(values, resolved, energy)
        if worst <= limit and spread < CLUSTER * limit / 4:
            break  # it would take too many blocks to tell whether others were missed
        needed = min(limit, max(spread / CLUSTER, limit / 4))
        check = end + BLOCK * math.ceil(math.log2(max(worst / needed, 2)))  # a block about halves it
        if worst <= needed:
            triples, residual = _refined(tall, previous @ vectors[:, -resolved - OVERSAMPLING :], resolved, needed)
            if residual <= limit:
                return triples
        if invariant:
            break
    return None


def _orthogonalized(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The QR decomposition of a block that is nearly orthogonal to a basis, and is made so."""
    block, r = torch.linalg.qr(block)
    for _ in range(4):  # twice is enough unless a column is reduced to rounding errors
        block, again = torch.linalg.qr(block - basis @ (basis.mT @ block))
        r = again @ r
        if again.diagonal().abs().min() > 0.5:
            break
    return block, r


def _least_spread(squares: Tensor, wanted: int, energy: Tensor) -> float:
    """The least relative difference of BLOCK consecutive Ritz values, given their squares in ascending order.

    Those that begin among the `wanted` leading ones count, unless less energy is left than one more of them has.
    """
    ritz = squares.flip(0).clamp(min=0).sqrt()
    last = ritz[BLOCK - 1 :][:wanted]
    first = ritz[: len(last)]
    left = energy - ritz[:wanted].square().sum()
    return min((1 - last / first)[last.square() <= 2 * left].tolist(), default=math.inf)


def _norm(matrix: Tensor) -> Tensor:
    """The Frobenius norm, in float64: one sum of millions of squares in float32 loses half of the digits."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.double)


def _signed(u: Tensor, s: Tensor, v: Tensor, norm: Tensor) -> Factors:
    largest = v.gather(0, v.abs().argmax(dim=0, keepdim=True)) if v.numel() else v.new_ones(1, v.shape[1])
    sign = torch.where(largest < 0, -1.0, 1.0).to(v.dtype)
    return Factors((u * sign * s).contiguous(), (v * sign).mT.contiguous(), s.contiguous(), norm)
