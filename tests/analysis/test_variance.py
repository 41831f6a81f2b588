"""Explained variance and recommended ranks, against singular values and built models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import clip_tower, experts_of, mlp
from torch import nn

from fusion_bench_smile import upscale
from fusion_bench_smile.analysis import added_parameters, explained_variance, ranks_needed, recommend


def test_explained_variance_is_that_of_the_singular_values():
    base = mlp()
    experts = dict(zip("ab", experts_of(base, 2), strict=True))
    table = explained_variance(base, experts)
    assert table.groupby(["layer", "expert"]).ngroups == 4
    for (layer, expert), rows in table.groupby(["layer", "expert"]):
        delta = experts[expert].get_submodule(layer).weight - base.get_submodule(layer).weight
        values = torch.linalg.svdvals(delta.detach().double()).numpy() ** 2
        np.testing.assert_allclose(rows["energy"], values, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(rows["explained"], values.cumsum() / values.sum(), rtol=1e-6)
        assert rows["rank"].tolist() == list(range(1, len(values) + 1))
    needed = ranks_needed(table)
    assert (needed["90 %"] <= needed["95 %"]).all()
    assert (needed["95 %"] <= needed["99 %"]).all()
    first = needed.iloc[0]
    rows = table[(table["layer"] == first["layer"]) & (table["expert"] == first["expert"])].set_index("rank")
    assert rows.loc[first["95 %"], "explained"] >= 0.95
    assert rows.loc[first["95 %"] - 1, "explained"] < 0.95


def low_rank_experts(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    experts = {}
    for seed in range(3):
        expert = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        for module in expert.modules():
            if isinstance(module, nn.Linear):
                out, columns = module.weight.shape
                b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)
                module.weight.data += 0.01 * b @ a
        experts[f"expert{seed}"] = expert
    return experts


@pytest.mark.parametrize("k", [2, 4])
def test_the_predicted_parameters_are_those_of_the_built_model(k):
    base = clip_tower()
    experts = low_rank_experts(base, 4)
    built = upscale(base, experts, k=k, gate_k=k)
    before = sum(p.numel() for p in base.parameters())
    predicted = added_parameters(explained_variance(base, experts), k)
    assert predicted == sum(p.numel() for p in built.parameters()) - before


def test_the_recommendation_keeps_its_share():
    base = clip_tower()
    variance = explained_variance(base, low_rank_experts(base, 4))
    everything = recommend(variance, 10**6, target=0.999999)
    assert everything.k == everything.gate_k == 4
    assert everything.kept == pytest.approx(1, abs=1e-6)
    half = recommend(variance, 10**6, target=0.5)
    kept = variance[variance["rank"] <= half.k]["energy"].sum() / variance["energy"].sum()
    assert kept >= 0.5
    assert half.kept == pytest.approx(kept)
    assert half.ratio == 1 + added_parameters(variance, half.k) / 10**6
