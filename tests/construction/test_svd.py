"""The methods of the truncated SVD against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench_smile.construction import Factors, low_rank_svd, truncated_svd

METHODS = ("exact", "gram", "krylov", "auto")


def spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    """A float64 matrix with these singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    return left * values @ right.T


def missed_energy(matrix: Tensor, factors: Factors, rank: int) -> float:
    """The share of the energy of the best subspace that the right singular vectors of the factors do not capture."""
    best = torch.linalg.svdvals(matrix.double())[:rank].square().sum()
    basis = torch.linalg.qr(factors.down.double().T).Q
    return float(1 - (matrix.double() @ basis).square().sum() / best)


def largest_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle in radians between the row spaces of a and b (same number of rows)."""
    a, b = torch.linalg.qr(a.double().T).Q, torch.linalg.qr(b.double().T).Q
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), ord=2).clamp(max=1).asin())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 120),
    columns=st.integers(1, 120),
    rank=st.integers(1, 130),
    decay=st.floats(0.0, 1.5),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 1000),
)
def test_every_method_finds_the_best_approximation(rows, columns, rank, decay, scale, method, seed):
    torch.manual_seed(seed)
    values = scale * torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -decay
    matrix = spectrum(rows, columns, values).float()
    factors = truncated_svd(matrix, rank, method=method)
    expected = torch.linalg.svdvals(matrix.double())[: factors.rank]
    assert factors.rank == min(rank, rows, columns)
    assert factors.up.shape == (rows, factors.rank)
    assert factors.down.shape == (factors.rank, columns)
    torch.testing.assert_close(factors.s.double(), expected, rtol=1e-4, atol=1e-5 * float(expected[0]))
    torch.testing.assert_close(factors.down @ factors.down.T, torch.eye(factors.rank), rtol=0, atol=2e-5)
    assert missed_energy(matrix, factors, rank) < 1e-5
    error = (matrix.double() - factors.up.double() @ factors.down.double()).square().sum()
    left = torch.linalg.svdvals(matrix.double())[factors.rank :].square().sum()
    assert float((error - left) / expected.square().sum()) < 1e-5


@pytest.mark.parametrize("method", ["gram", "krylov"])
@pytest.mark.parametrize("shape", [(384, 384), (700, 300), (300, 700)])
@pytest.mark.parametrize("kind", ["decaying with noise", "noise", "steep"])
def test_the_fast_methods_are_as_good_as_the_exact_one(method, shape, kind):
    values = torch.arange(1, 301, dtype=torch.float64)
    matrix = {
        "decaying with noise": lambda: spectrum(*shape, values**-0.7) + 0.002 * torch.randn(shape, dtype=torch.float64),
        "noise": lambda: torch.randn(shape, dtype=torch.float64),
        "steep": lambda: spectrum(*shape, 0.8**values),
    }[kind]()
    factors = truncated_svd(matrix.float(), 32, method=method)
    assert missed_energy(matrix, factors, 32) < 1e-6
    if kind != "noise":
        exact = torch.linalg.svd(matrix, full_matrices=False).Vh[:16]
        assert largest_angle(factors.down[:16], exact) < 1e-3


@pytest.mark.parametrize(
    ("values", "floor"),
    [
        pytest.param(torch.ones(16), 1e-3, id="a merged adapter in a rounded checkpoint"),
        pytest.param(torch.ones(16), 0.0, id="a merged adapter"),
        pytest.param(torch.ones(21), 1e-9, id="a rank that is no multiple of the block"),
        pytest.param(0.6 ** torch.arange(20), 1e-4, id="steep, on a floor"),
    ],
)
def test_krylov_resolves_what_the_gram_matrix_does_not(monkeypatch, values, floor):
    torch.manual_seed(0)
    rows, columns = 600, 520
    matrix = spectrum(rows, columns, values.double())
    matrix += floor * torch.randn(rows, columns, dtype=torch.float64) / columns**0.5
    eigh, sides = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sides.append(len(matrix)) or eigh(matrix))
    factors = truncated_svd(matrix.float(), 32, method="krylov")
    assert max(sides) < columns  # the Gram matrix was not decomposed: no fallback
    expected = torch.linalg.svdvals(matrix)
    kept = int((expected > 10 * rows * torch.finfo(torch.float32).eps * expected[0]).sum())
    assert min(kept, 32) <= factors.rank <= 32
    torch.testing.assert_close(factors.s.double(), expected[: factors.rank], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(factors.down @ factors.down.T, torch.eye(factors.rank), rtol=0, atol=2e-5)
    assert missed_energy(matrix, factors, factors.rank) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_directions_are_left_out(method, dtype):
    b, a = torch.randint(-3, 4, (150, 5)).to(dtype), torch.randint(-3, 4, (5, 130)).to(dtype)
    matrix = (b.double() @ a.double()).to(dtype)  # small integers: exact in every dtype
    factors = truncated_svd(matrix, 16, method=method)
    assert factors.rank == 5
    assert factors.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(factors.up @ factors.down, matrix.to(factors.s.dtype), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_zero_has_rank_zero(method):
    factors = truncated_svd(torch.zeros(90, 70), 4, method=method)
    assert factors.rank == 0
    assert factors.up.shape == (90, 0)
    assert factors.down.shape == (0, 70)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_deterministic_and_its_signs_are_fixed(method):
    matrix = torch.randn(200, 150)
    first, second = truncated_svd(matrix, 9, method=method), truncated_svd(matrix.clone(), 9, method=method)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first.down.gather(1, first.down.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_is_not_modified(method):
    for matrix in (torch.randn(90, 70), torch.randn(70, 90), torch.randn(90, 70).T, torch.randn(70, 90).T):
        before = matrix.clone()
        truncated_svd(matrix, 4, method=method)
        assert torch.equal(matrix, before)


def test_a_truncation_is_a_prefix():
    matrix = torch.randn(100, 90)
    large, small = truncated_svd(matrix, 20, method="exact"), truncated_svd(matrix, 7, method="exact")
    assert all(torch.equal(a, b) for a, b in zip(large.truncated(7), small, strict=True))


def test_krylov_falls_back_where_it_does_not_converge():
    matrix = torch.randn(256, 256)  # a flat spectrum
    krylov, gram = (truncated_svd(matrix, 8, method=m, tol=1e-12) for m in ("krylov", "gram"))
    assert torch.equal(krylov.s, gram.s)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    rank=st.integers(1, 12),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_the_svd_of_factors_is_that_of_their_product(rows, columns, rank, seed, dtype):
    torch.manual_seed(seed)
    b, a = torch.randn(rows, rank).to(dtype), torch.randn(rank, columns).to(dtype)
    factors = low_rank_svd(b, a)
    product = b.double() @ a.double()
    assert factors.rank <= min(rows, columns, rank)
    torch.testing.assert_close((factors.up @ factors.down).double(), product, rtol=1e-4, atol=1e-4)
    expected = torch.linalg.svdvals(product)[: factors.rank]
    torch.testing.assert_close(factors.s.double(), expected, rtol=1e-4, atol=1e-4)
    short = low_rank_svd(b, a, rank=2)
    assert short.rank == min(2, factors.rank)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="method 'lanczos'"):
        truncated_svd(torch.randn(3, 3), 2, method="lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank of at least 1"):
        truncated_svd(torch.randn(3, 3), 0)
    with pytest.raises(ValueError, match="can't be multiplied"):
        low_rank_svd(torch.randn(3, 2), torch.randn(3, 4))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    true_rank=st.integers(0, 12),
    rank=st.integers(1, 15),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_truncated_svd_is_the_best_approximation(rows, columns, true_rank, rank, dtype):
    matrix = (torch.randn(rows, true_rank) @ torch.randn(true_rank, columns)).to(dtype)
    factors = truncated_svd(matrix, rank)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close((factors.up @ factors.down).double(), best, rtol=tolerance, atol=tolerance)
    identity = torch.eye(factors.rank, dtype=torch.float64)
    torch.testing.assert_close((factors.down @ factors.down.T).double(), identity, rtol=0, atol=1e-4)
    assert factors.rank <= min(rank, rows, columns)


def test_the_numerical_rank_limits_the_factors():
    delta = torch.randn(30, 3) @ torch.randn(3, 20)
    assert truncated_svd(delta, 10).rank == 3
    assert truncated_svd(torch.zeros(4, 4), 2).rank == 0


def test_the_energy_of_a_truncation():
    matrix = spectrum(20, 10, torch.tensor([3.0, 2.0, 1.0]).double())
    factors = truncated_svd(matrix, 2)
    assert factors.energy(1) == pytest.approx(9 / 14)
    assert factors.energy(2) == factors.energy(5) == pytest.approx(13 / 14)
    assert factors.norm.item() == pytest.approx(14**0.5)
    assert [tensor.device.type for tensor in factors.to(torch.device("meta"))] == ["meta"] * 4
