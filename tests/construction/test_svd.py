"""The methods of the truncated SVD against LAPACK in float64."""

from __future__ import annotations

from collections.abc import Callable

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


@st.composite
def clustered_values(draw: st.DrawFn, count: int) -> Tensor:
    """Singular values with many that are equal, or nearly so, after some that are larger, before others or none."""
    larger, equal = draw(st.integers(0, 24)), draw(st.integers(15, 200))
    width = draw(st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2]))
    rest = torch.rand(count - larger - equal).double()
    rest = draw(st.sampled_from([rest, 0.8 ** torch.arange(len(rest)).double()]))
    smaller = draw(st.sampled_from([0.0, 1e-3, 0.5, 0.97]))
    step = draw(st.sampled_from([1e-3, 0.1, 3.0]))
    cluster = 1 + width * torch.rand(equal).double()
    return torch.cat([1 + width + step * torch.arange(1, larger + 1), cluster, smaller * rest])


@settings(max_examples=30, deadline=None)
@given(
    values=clustered_values(300),
    rank=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    wide=st.booleans(),
    method=st.sampled_from(["krylov", "krylov", "gram", "auto"]),
)
def test_no_method_misses_one_of_many_equal_values(values, rank, dtype, scale, wide, method):
    matrix = scale * spectrum(330, 300, values)
    matrix = (matrix.T if wide else matrix).to(dtype)
    factors = truncated_svd(matrix, rank, method=method)
    assert min(rank, int((values >= 1).sum())) <= factors.rank <= rank
    assert missed_energy(matrix / scale, factors, rank) < 1e-5
    expected = torch.linalg.svdvals(matrix.double() / scale)[: factors.rank]
    torch.testing.assert_close(factors.s.double() / scale, expected, rtol=1e-4, atol=1e-5 * float(values.max()))


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def with_columns(*scales: float) -> Tensor:
    """Noise, with equally many columns of each scale."""
    return torch.cat([scale * torch.randn(300, 280 // len(scales)) for scale in scales], dim=1)


HARD: dict[str, Callable[[], Tensor]] = {
    "a cluster": lambda: spectrum(
        420, 400, torch.cat([1 + 1e-3 * torch.rand(150), 0.8 ** torch.arange(1, 200)]).double()
    ),
    "a wider cluster": lambda: spectrum(
        420, 400, torch.cat([1 + 4e-3 * torch.rand(200), 0.8 ** torch.arange(1, 200)]).double()
    ),
    "128 equal values": lambda: spectrum(600, 512, torch.cat([torch.ones(128), torch.full((300,), 0.7)]).double()),
    "equal blocks": lambda: torch.block_diag(*[torch.randn(15, 15).double()] * 40),
    "equal wide blocks": lambda: torch.block_diag(*[spectrum(9, 15, 0.7 ** torch.arange(9.0).double())] * 40),
    "a Kronecker product": lambda: torch.kron(
        torch.linalg.qr(torch.randn(32, 32).double()).Q.contiguous(),
        spectrum(12, 12, 0.6 ** torch.arange(12.0).double()),
    ),
    "a Kronecker product in float32": lambda: torch.kron(
        torch.linalg.qr(torch.randn(32, 32)).Q.contiguous(), torch.randn(10, 10)
    ),
    "17 of each value": lambda: torch.diag(0.8 ** (torch.arange(400.0) // 17)),
    "identity": lambda: torch.eye(300),
    "orthonormal columns": lambda: torch.linalg.qr(torch.randn(500, 300)).Q,
    "Hadamard": lambda: hadamard(256),
    "rows of a Hadamard matrix": lambda: hadamard(512)[:300],
    "64 equal directions": lambda: spectrum(400, 300, torch.ones(64).double()),
    "64 equal directions, rounded": lambda: spectrum(400, 300, torch.ones(64).double()).bfloat16(),
    "20 above flat noise": lambda: spectrum(400, 300, torch.cat([torch.full((20,), 5.0), torch.ones(280)]).double()),
    "steps below the resolution": lambda: spectrum(
        400, 300, torch.cat([torch.ones(20), torch.full((200,), 0.02), torch.full((80,), 0.001)]).double()
    ),
    "columns of 1e-25": lambda: with_columns(1.0, 1e-25),
    "columns down to denormal numbers": lambda: with_columns(1.0, *10.0 ** torch.arange(-6.0, -44, -1.0)),
    "columns that overflow when squared": lambda: with_columns(1e25, 1.0),
    "columns of 1e-200": lambda: with_columns(1.0, 1.0).double() * torch.tensor([1.0, 1e-200]).double().repeat(140),
    "rows of zeros": lambda: torch.cat([torch.randn(40, 300), torch.zeros(300, 300)]),
    "repeated rows": lambda: torch.randn(12, 300).repeat(30, 1),
    "ones": lambda: torch.ones(300, 290),
}


@pytest.mark.parametrize("method", ["gram", "krylov", "auto"])
@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(name, method):
    matrix = HARD[name]()
    scaled = matrix.double() / matrix.abs().max()
    for rank in (4, 20, 32):
        factors = truncated_svd(matrix, rank, method=method)
        assert missed_energy(scaled, factors, rank) < 1e-5
        identity = torch.eye(factors.rank, dtype=factors.down.dtype)
        torch.testing.assert_close(factors.down @ factors.down.T, identity, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(600, 600), (1600, 560)])
def test_noise_needs_no_fallback(monkeypatch, shape):
    eigh, sides = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sides.append(len(matrix)) or eigh(matrix))
    truncated_svd(torch.randn(shape), 32)
    assert 0 < max(sides) < min(shape)  # the Gram matrix was not decomposed


def test_lapack_failures_end_in_float64(monkeypatch):
    def fail(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    matrix = torch.randn(120, 100)
    for method in ("gram", "krylov"):
        factors = truncated_svd(matrix, 12, method=method)
        assert missed_energy(matrix, factors, 12) < 1e-12


def test_a_layout_in_memory_does_not_change_the_bits():
    matrix = torch.randn(400, 380)
    for each in (matrix, matrix.T):
        copies = (each.contiguous(), each.T.contiguous().T)
        first, second = (truncated_svd(copy, 9) for copy in copies)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_matrix_that_is_not_finite_is_refused(value):
    matrix = torch.randn(9, 7)
    matrix[3, 2] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        truncated_svd(matrix, 2)


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
