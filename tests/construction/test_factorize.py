"""Factorization: experts stream, each by the shortest path to its factors, and mismatched ones are refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import experts_of, mlp, perturbed
from torch import nn

from fusion_bench_smile import FactorCache, PlanError, SmileConfig, upscale
from fusion_bench_smile.construction.factorize import FactorizedExperts, Factorizer, factorize_experts
from fusion_bench_smile.construction.parallel import WorkPartition
from fusion_bench_smile.construction.plan import make_plan
from fusion_bench_smile.io import StateDictSource


def deeper() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Linear(12, 4))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 12, bias=False))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32, bias=False), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 12, bias=False))


def with_nan() -> nn.Module:
    model = mlp()
    model[3].weight.data[0, 0] = float("nan")
    return model


def with_infinity() -> nn.Module:
    model = mlp()
    model[1].bias.data[0] = float("inf")
    return model


BAD_EXPERTS = [
    (deeper, "expert 'bad' has another architecture than the pretrained model: 2 additional tensors (first: 4.weight)"),
    (without_bias, "1 tensors missing (first: 0.bias)"),
    (wider, "expert 'bad': 3.weight has the shape (12, 48), the pretrained model's (12, 32)"),
    (with_nan, "expert 'bad' holds NaN in 3.weight"),
    (with_infinity, "expert 'bad' holds infinity in 1.bias"),
]


@pytest.mark.parametrize(("make", "message"), BAD_EXPERTS, ids=[m.__name__ for m, _ in BAD_EXPERTS])
@pytest.mark.parametrize("loaded", [True, False], ids=["module", "function"])
def test_mismatched_experts_are_named(make, message, loaded):
    base = mlp()
    bad = make() if loaded else make
    with pytest.raises(PlanError) as error:
        upscale(base, {"good": perturbed(base), "bad": bad}, gate_k=2, k=4)
    assert message in str(error.value)


def test_experts_may_be_loaded_one_at_a_time():
    base = mlp()
    experts = experts_of(base)
    calls: list[int] = []
    loaded: list[weakref.ref] = []

    def loader(index: int) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            gc.collect()
            assert not any(reference() for reference in loaded), "the expert before was not dropped"
            calls.append(index)
            expert = perturbed(base, seed=index + 1)
            loaded.append(weakref.ref(expert))
            return expert

        return load

    streamed = upscale(base, {str(i): loader(i) for i in range(3)}, gate_k=2, k=4)
    assert calls == [0, 1, 2]
    expected = upscale(base, experts, gate_k=2, k=4).state_dict()
    assert streamed.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed.state_dict().items())


def test_progress_counts_pairs_of_experts_and_layers():
    base, counts = mlp(), []
    upscale(base, experts_of(base), gate_k=2, k=4, on_progress=lambda done, total: counts.append((done, total)))
    assert counts == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("options", "with_router", "expected"),
    [
        ({}, True, {"delta": 4}),
        ({"gate_k": 8}, True, {"delta": 8}),
        ({"gate_k": 8}, False, {"delta": 4}),
        ({"k": -1}, True, {"delta": 2}),
        ({"k": -1}, False, {}),
        ({"routing_use_diff": False}, True, {"delta": 4, "weight": 2}),
        ({"routing_use_diff": False, "k": -1}, True, {"weight": 2}),
    ],
)
def test_the_ranks_of_a_factorization(options, with_router, expected):
    config = SmileConfig(**{"gate_k": 2, "k": 4, **options})
    layer = make_plan(mlp(), 3, config).layers[0]
    assert Factorizer(config, with_router).ranks(layer) == expected


@pytest.mark.parametrize("with_cache", [False, True])
def test_every_tensor_of_an_expert_is_counted_once(with_cache, tmp_path):
    base, config = mlp(), SmileConfig(gate_k=2, k=4)
    plan = make_plan(base, 3, config)
    factorizer = Factorizer(config, True, FactorCache(tmp_path) if with_cache else None)
    experts = {str(i): StateDictSource(expert.state_dict()) for i, expert in enumerate(experts_of(base))}
    factorized = FactorizedExperts()
    factorize_experts(plan, base, experts, factorizer, WorkPartition(), factorized)
    assert factorizer.bytes_read == 3 * 4 * (20 * 32 + 32 + 32 * 12)
    assert list(factorized.layers) == ["0", "3"]
    assert all(change.unused.keys() == {"1.weight", "1.bias"} for change in factorized.changes.values())
    assert all(change.used.keys() == {"0.weight", "3.weight"} for change in factorized.changes.values())
    assert not factorized.sums
    assert not factorized.differences


def test_the_factors_of_one_layer_are_those_of_its_delta():
    base, config = mlp().double(), SmileConfig(gate_k=2, k=4)
    plan, (expert,) = make_plan(base, 2, config), experts_of(base, 1)
    source = StateDictSource(base.state_dict())
    items = [(plan.layers[0], StateDictSource(expert.state_dict()), "expert")]
    (factors,) = Factorizer(config, True).factorize(source, items)
    delta = expert[0].weight - base[0].weight
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    assert (factors.rank, factors.gate_rank) == (4, 2)
    directions = torch.cat([factors.gate, factors.down])
    torch.testing.assert_close(factors.up.mT @ directions, (u[:, :4] * s[:4]) @ vh[:4])
    assert factors.energy == pytest.approx((s[:4].square().sum() / s.square().sum()).item())
    torch.testing.assert_close(factors.bias, (expert[0].bias - base[0].bias).detach())
