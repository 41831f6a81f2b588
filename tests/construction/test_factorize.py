"""Factorization: experts stream, each by the shortest path to its factors, and mismatched ones are refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import clip_tower, experts_of, mlp, perturbed
from torch import nn

from fusion_bench_smile import FactorCache, PlanError, SmileConfig, upscale, upscale_to_folder
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


def with_value(model: nn.Module, name: str, value: float) -> nn.Module:
    """A copy with one entry of a parameter set to a value."""
    changed = copy.deepcopy(model)
    changed.get_parameter(name).data.view(-1)[3] = value
    return changed


OUT_OF_RANGE: list[tuple[torch.dtype, str, float, dict, str]] = [
    (torch.float32, "0.weight", 2e38, {}, "expert '1': the change of 0.weight"),
    (torch.float32, "0.weight", 2e38, {"k": -1}, "expert '1': the change of 0.weight"),
    (torch.float32, "0.bias", 2e38, {}, "expert '1': the change of 0.bias"),
    (torch.float16, "0.weight", 65504, {}, "expert '1': the change of 0.weight"),
    (torch.float16, "0.weight", 65504, {"k": -1}, "expert '1': the change of 0.weight"),
    (torch.float16, "3.weight", 65504, {"routing_use_diff": False}, "expert '1': the change of 3.weight"),
    (torch.float16, "0.bias", 65504, {}, "expert '1': the change of 0.bias"),
    (torch.float16, "0.weight", 32752, {"k": -1, "storage": "int8"}, "expert '1': the change of 0.weight"),
    (torch.float16, "0.weight", 32600, {"k": -1, "storage": "int4"}, "expert '1': the change of 0.weight"),
    (torch.bfloat16, "0.weight", 1.69e38, {"k": -1, "storage": "int4"}, "expert '1': the change of 0.weight"),
]


@pytest.mark.parametrize(("dtype", "name", "value", "options", "subject"), OUT_OF_RANGE)
def test_changes_out_of_range_are_refused(dtype, name, value, options, subject, tmp_path):
    base = with_value(mlp().to(dtype), name, -value)
    experts = [perturbed(base), with_value(perturbed(base), name, value)]
    before = copy.deepcopy(base.state_dict())
    hint = "load the models in bfloat16 or float32"
    if dtype != torch.float16:
        hint = "check how these weights were trained and saved, or load the models in float64"
    for cache in (None, FactorCache(tmp_path), FactorCache(tmp_path)):
        with pytest.raises(PlanError) as error:
            upscale(base, experts, factor_cache=cache, in_place=True, **{"gate_k": 2, "k": 4, **options})
        assert str(error.value) == f"{subject} is outside the range of {str(dtype)[6:]}; {hint}"
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())
    larger = torch.float32 if dtype == torch.float16 else torch.float64
    model = upscale(base.to(larger), [e.to(larger) for e in experts], **{"gate_k": 2, "k": 4, **options})
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_an_average_out_of_range_is_refused(tmp_path):
    base = mlp()
    experts = [with_value(base, "1.weight", 2e38) for _ in range(2)]
    message = (
        r"^the experts' average of 1.weight is outside the range of float32; check .* or load the models in float64$"
    )
    with pytest.raises(PlanError, match=message):
        upscale(base, experts, gate_k=2, k=4, average_experts=True, in_place=True)
    assert base[1].weight.max() == 1
    half = mlp().half()
    experts = [with_value(mlp(), "1.weight", 70_000.0) for _ in range(2)]
    with pytest.raises(PlanError, match=r"average of 1\.weight is outside the range of float16; load .* bfloat16"):
        upscale(half, experts, gate_k=2, k=4, average_experts=True)
    tower, name = clip_tower(), "vision_model.post_layernorm.weight"
    tower.save_pretrained(tmp_path / "base")
    with_value(tower, name, 2e38).save_pretrained(tmp_path / "expert")
    paths = {"a": tmp_path / "expert", "b": tmp_path / "expert"}
    with pytest.raises(PlanError, match=f"average of {name} is outside the range of float32"):
        upscale_to_folder(tmp_path / "base", paths, tmp_path / "out", gate_k=2, k=4, average_experts=True)
    assert not (tmp_path / "out").exists()


class LowRankSource(StateDictSource):
    """A model whose linear layers changed by factors, as those of an adapter."""

    def __init__(self, model: nn.Module, scale: float = 0.1) -> None:
        super().__init__(model.state_dict())
        shapes = {name: shape for name, shape in self.shapes().items() if len(shape) == 2}
        self.pairs = {n: (scale * torch.randn(out, 3), torch.randn(3, width)) for n, (out, width) in shapes.items()}

    def low_rank(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.pairs.get(name)


def test_factored_changes_are_the_same_with_a_cache(tmp_path):
    base = mlp()
    experts = {"a": LowRankSource(base), "b": LowRankSource(base)}
    expected = upscale(base, experts, gate_k=2, k=4).state_dict()
    cache = FactorCache(tmp_path)
    found = upscale(base, experts, gate_k=2, k=4, factor_cache=cache).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (cache.hits, cache.misses) == (0, 0)
    with pytest.raises(PlanError, match=r"^expert 'b': the change of 0.weight can't be factored"):
        upscale(base, {"a": experts["a"], "b": LowRankSource(base, 1e38)}, gate_k=2, k=4)


def test_lapack_failures_are_one_error(monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    base = mlp()
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(PlanError, match=r"^expert '0': the change of 0.weight can't be factored \(The algorithm"):
        upscale(base, experts_of(base), gate_k=2, k=4)
