"""Measured costs against built models and counted operations."""

from __future__ import annotations

import pytest
from conftest import experts_of, mlp, mlp_inputs

from fusion_bench_smile import upscale
from fusion_bench_smile.analysis import ModelCall, costs


def test_costs_are_those_of_the_built_models():
    base = mlp()
    experts = dict(zip("abc", experts_of(base), strict=True))
    call = ModelCall((), mlp_inputs())
    table = costs(base, experts, [(3, 4, 4), (1, 4, 4), (3, 2, 2)], call, repeats=2).set_index(
        ["experts", "gate_k", "k"]
    )
    plain = sum(p.numel() for p in base.parameters())
    for (count, gate_k, k), row in table.iterrows():
        built = upscale(base, dict(list(experts.items())[:count]), gate_k=gate_k, k=k)
        assert row["parameters"] == sum(p.numel() for p in built.parameters()) / plain
        assert row["construction"] > 0
        assert row["forward"] > 0
    assert table.loc[(3, 4, 4), "flops"] > table.loc[(3, 2, 2), "flops"] > 1
    # one expert of rank 4: (20 + 32)·4 and (32 + 12)·4 multiply-adds, and 32 for a bias, beside 20·32 and 32·12
    assert table.loc[(1, 4, 4), "flops"] == pytest.approx(1 + (52 * 4 + 44 * 4 + 32) / (640 + 384))
