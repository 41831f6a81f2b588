"""Singular values: energy that a truncated SVD captures, against float64, and weights at the ends of their dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fusion_bench_smile import upscale
from fusion_bench_smile.construction import Factors, truncated_svd
from studies.reliability.outcomes import Outcome, check, judge
from studies.reliability.runner import Case, Part, Trial

MISSED = 2e-6  # the largest share of the energy that may be missed, of what the best factors of the rank capture
SIDE = 640  # block Krylov serves ranks up to 48 at this size


def clusters(_: None, case: Case) -> Iterator[Outcome]:
    """Leading singular values that are equal many times over, or nearly."""
    generator, rank = _generator(case), case.random.choice((8, 16, 32, 48))
    count = case.random.choice((rank, 2 * rank, 4 * rank, 128))
    values = torch.full((SIDE,), case.random.choice((0.0, 1e-4, 0.1)), dtype=torch.float64)
    values[:count] = 1
    values += case.random.choice((0.0, 1e-7, 1e-4, 1e-2)) * torch.rand(SIDE, generator=generator, dtype=torch.float64)
    yield _judge(_with_spectrum(values, generator), rank)


def blocks(_: None, case: Case) -> Iterator[Outcome]:
    """Equal blocks along the diagonal, and other matrices with few distinct singular values."""
    generator, rank = _generator(case), case.random.choice((8, 15, 16, 30, 32))
    side = case.random.choice((5, 8, 15, 16, 20))
    block = torch.randn(side, side, generator=generator)
    matrix = torch.block_diag(*[block] * (SIDE // side))
    if case.random.random() < 0.5:
        matrix = matrix[torch.randperm(len(matrix), generator=generator)]
    if case.random.random() < 0.3:
        matrix = torch.cat([matrix, matrix], dim=case.random.choice((0, 1)))
    yield _judge(matrix, rank)


def decays(_: None, case: Case) -> Iterator[Outcome]:
    """Random spectra, shapes, ranks and scales."""
    generator, rank = _generator(case), case.random.choice((1, 2, 4, 8, 16, 32, 64))
    shape = (case.random.choice((3, 40, 100, 300, 600)), case.random.choice((3, 40, 100, 300, 600)))
    number = torch.arange(min(shape), dtype=torch.float64)
    values = case.random.choice((
        0.5**number, 0.9**number, 1 / (1 + number), 1 / (1 + number) ** 2, torch.ones(len(number)).double(),
        torch.rand(len(number), generator=generator, dtype=torch.float64), (number < 5).double(), torch.exp(-number**2),
    ))  # fmt: skip
    scale = case.random.choice((1e-30, 1e-10, 1.0, 1.0, 1e10, 1e30))
    yield _judge((_with_spectrum(values, generator, shape) * scale).float(), rank)


def scaled(_: None, case: Case) -> Iterator[Outcome]:
    """Rows and columns that differ by many orders of magnitude."""
    generator, rank = _generator(case), case.random.choice((1, 4, 16, 32))
    rows, columns = case.random.choice((50, 80, 300, 640)), case.random.choice((50, 80, 300, 640))
    matrix = torch.randn(rows, columns, generator=generator)
    low = case.random.choice((-25, -12, -40, -6))
    exponents = low * torch.rand(columns, generator=generator).round(decimals=case.random.choice((0, 3)))
    matrix = matrix * 10.0**exponents
    yield _judge(matrix if case.random.random() < 0.5 else matrix.T.contiguous(), rank)


def extremes(_: None, case: Case) -> Iterator[Outcome]:
    """Experts with weights at the ends of the range of their dtype: finite parameters, or a clear error."""
    generator = _generator(case)
    dtype = case.random.choice((torch.float32, torch.float16, torch.bfloat16))
    largest = torch.finfo(dtype).max * case.random.choice((1.0, 0.6, 0.01))
    models = [nn.Sequential(nn.Linear(80, 70)).to(dtype) for _ in range(3)]
    for layer in [cast(nn.Linear, model[0]) for model in models[case.random.choice((0, 1)) :]]:
        signs = torch.randn(70, 80, generator=generator).sign().double() * largest
        chosen = torch.rand(70, 80, generator=generator) < case.random.choice((0.01, 1.0))
        layer.weight.data.copy_(signs * chosen)
    diff = case.random.random() < 0.7

    def examine_model(model: nn.Module) -> Outcome:
        bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        return check(not bad, f"infinite parameters: {bad}")

    base, *experts = models
    yield judge(lambda: upscale(base, experts, gate_k=2, k=4, routing_use_diff=diff), examine_model)


def _judge(matrix: Tensor, rank: int) -> Outcome:
    """The outcome of factoring a matrix. A ValueError is documented."""
    return judge(lambda: truncated_svd(matrix, rank), partial(examine, matrix, rank), allowed=(ValueError,))


def examine(matrix: Tensor, rank: int, factors: Factors) -> Outcome:
    """Right if factors capture as much energy of a matrix as the best ones of the rank."""
    best = torch.linalg.svdvals(matrix.double())[:rank].square().sum()
    rest = (matrix.double() - factors.up.double() @ factors.down.double()).square().sum()
    missed = float((rest - (matrix.double().square().sum() - best)) / best) if best else 0.0
    return check(missed <= MISSED and factors.rank <= rank, f"{missed:.3g} of the energy is missed")


def _with_spectrum(values: Tensor, generator: torch.Generator, shape: tuple[int, int] | None = None) -> Tensor:
    """A matrix with given singular values and random singular vectors."""
    rows, columns = shape or (len(values), len(values))
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    return (left * values) @ right.T if shape else ((left * values) @ right.T).float()


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.random.randrange(2**60))


PART = Part("svd", lambda folder: None, {
    "equal singular values": Trial(clusters, 150), "equal blocks": Trial(blocks, 100),
    "other spectra": Trial(decays, 150), "rows and columns of all sizes": Trial(scaled, 100),
    "weights at the end of the range": Trial(extremes, 200),
})  # fmt: skip
