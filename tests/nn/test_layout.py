"""The ranks of the experts in one layer."""

from __future__ import annotations

import pytest

from fusion_bench_smile.nn.layout import DENSE, ExpertLayout, is_uniform

MIXED = ExpertLayout(ranks=(4, 0, 2, DENSE), gate_ranks=(2, 1, 3, 2), expert_bias=True)


def test_the_rows_of_every_tensor():
    assert MIXED.num_experts == 4
    assert MIXED.low_ranks == (4, 0, 2, 0)
    assert MIXED.shared_ranks == (2, 0, 2, 0)
    assert MIXED.down_ranks == (2, 0, 0, 0)
    assert MIXED.dense_ranks == (0, 0, 0, 1)
    assert MIXED.dense_experts == (3,)
    assert MIXED.rows == {"gate": (2, 1, 3, 2), "down": (2, 0, 0, 0), "up": (4, 0, 2, 0), "dense": (0, 0, 0, 1)}


def test_a_separate_router_shares_no_row():
    layout = ExpertLayout(ranks=(4, 2), gate_ranks=(2, 3), shared_router=False)
    assert layout.shared_ranks == (0, 0)
    assert layout.down_ranks == layout.low_ranks == (4, 2)


@pytest.mark.parametrize(("sizes", "expected"), [((3, 3, 3), True), ((3,), True), ((3, 2), False), ((), False)])
def test_uniform(sizes, expected):
    assert is_uniform(sizes) == expected
