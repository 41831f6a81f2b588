"""Router scores against direct float64 algebra; those of whole inputs are in test_energy.py."""

from __future__ import annotations

import pytest
import torch
from conftest import clip_tower, experts_of
from layers import RAGGED, random_layer

from fusion_bench_smile import upscale
from fusion_bench_smile.nn import (
    RoutedLayer,
    energy_shares,
    expert_norms,
    project_on_router,
    router_scores,
    routing_features,
    routing_weights,
    select_experts,
)


@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
def test_router_scores_are_the_norms_of_projections(storage: str) -> None:
    tower = clip_tower()
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, storage=storage)
    layer = next(layer for layer in model.modules() if isinstance(layer, RoutedLayer))
    x = torch.randn(2, 5, layer.weight.shape[1])
    norms = [(x.double() @ layer.rows("gate", expert).double().mT).norm(dim=-1) for expert in range(3)]
    torch.testing.assert_close(router_scores(layer, x), torch.stack(norms, dim=-1).float(), atol=1e-4, rtol=1e-3)


def test_without_a_router_there_are_no_scores():
    tower = clip_tower()
    alone = upscale(tower, experts_of(tower, 1), k=4)
    layer = next(layer for layer in alone.modules() if isinstance(layer, RoutedLayer))
    x = torch.randn(3, layer.weight.shape[1])
    assert project_on_router(layer, x) is None
    assert router_scores(layer, x) is None
    assert energy_shares(layer, x) is None
    assert routing_features(layer, x) is None


def test_an_expert_without_router_rows_scores_zero():
    layer, x = random_layer(RAGGED, 6, 5), torch.randn(7, 6, dtype=torch.float64)
    assert router_scores(layer, x)[:, 1].abs().max() == 0
    assert energy_shares(layer, x)[:, 1].abs().max() == 0


@pytest.mark.parametrize("gate_ranks", [(2, 2), (1, 3), (0, 4)])
def test_expert_norms(gate_ranks):
    values = torch.randn(3, 4)
    expected = torch.stack([block.norm(dim=-1) for block in values.split(gate_ranks, -1)], -1)
    torch.testing.assert_close(expert_norms(values, gate_ranks), expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_the_papers(top_k):
    """A softmax over all experts, the top k of them, and a renormalisation."""
    scores = torch.randn(50, 3, dtype=torch.float64)
    probabilities = scores.softmax(-1)
    kept, expected_experts = probabilities.topk(top_k)
    experts, weights = select_experts(scores, top_k)
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, kept / kept.sum(-1, keepdim=True))
    all_weights = routing_weights(scores, top_k)
    assert all_weights.shape == scores.shape
    assert ((all_weights > 0).sum(-1) == top_k).all()
    torch.testing.assert_close(all_weights.gather(-1, experts), weights)
