"""The plan: the layers and ranks of an upscaling, and all that is refused before any factorization."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import experts_of, mlp, resnet, t5
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, SmileConfig, SmileLinear, plan_upscaling, upscale
from fusion_bench_smile.construction import estimate_seconds, make_plan
from fusion_bench_smile.construction.plan import allocate_ranks, check_finite
from fusion_bench_smile.nn import SmileConv2d, count_bytes, count_parameters


def test_modules_are_selected_by_pattern():
    base = t5()
    experts = experts_of(base)
    only = upscale(base, experts, gate_k=2, k=4, target_modules=["*.SelfAttention.*"], exclude_modules=["decoder.*"])
    routed = [n for n, m in only.named_modules() if isinstance(m, SmileLinear)]
    assert len(routed) == 8
    assert all(n.startswith("encoder") and "SelfAttention" in n for n in routed)


def test_ranks_are_limited_by_the_layer(caplog):
    base = mlp()
    with caplog.at_level("INFO"):
        upscaled = upscale(base, experts_of(base), gate_k=14, k=16)
    assert upscaled[3].layout.ranks == (12, 12, 12)
    assert upscaled[3].layout.gate_ranks == (12, 12, 12)
    limited = [r.getMessage() for r in caplog.records if "limited" in r.getMessage()]
    assert limited == [
        "gate_k=14 is limited by the size of 1 of 2 layers, first of 3 (12)",
        "k=16 is limited by the size of 1 of 2 layers, first of 3 (12)",
    ]


BAD_OPTIONS = [
    ({"top_k": 4}, "top_k=4 is more than the 3 experts"),
    ({"k": 21}, "k=21 is more than any layer allows; the largest possible is 20"),
    ({"gate_k": 99}, "gate_k=99 is more than any layer allows"),
    ({"target_modules": ["nope.*"]}, "'nope.*' matches no linear layer"),
    ({"target_modules": ["0x"]}, "'0x' matches no linear layer of this model (did you mean '0'?)"),
    ({"exclude_modules": ["*"]}, "leave none of the 2 linear layers"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_options_that_do_not_fit_the_model_are_named(options, message):
    base = mlp()
    for call in (upscale, plan_upscaling):
        with pytest.raises((ConfigError, PlanError)) as error:
            call(base, experts_of(base), **{"gate_k": 2, "k": 4, **options})
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_no_experts():
    with pytest.raises(PlanError, match="no experts"):
        upscale(mlp(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_the_pretrained_model_that_are_not_finite(value):
    base = mlp()
    base[3].weight.data[0, 0] = value
    kind = "NaN" if math.isnan(value) else "infinity"
    with pytest.raises(PlanError, match=rf"the pretrained model holds {kind} in 3\.weight"):
        upscale(base, [mlp()], gate_k=2, k=4)


def test_large_finite_values_are_no_error():
    check_finite(torch.full((10,), torch.finfo(torch.float32).max), "weight", "the model")  # their sum overflows
    check_finite(torch.full((10,), torch.finfo(torch.float16).max, dtype=torch.float16), "weight", "the model")
    check_finite(torch.arange(3), "ids", "the model")


def test_layers_that_are_read_past_their_forward_are_refused():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
            self.out = nn.Linear(8, 8)

    base = Attention()
    message = r"attention.out_proj .* exclude_modules=\['attention.out_proj'\]"
    with pytest.raises(PlanError, match=message):
        upscale(base, experts_of(base, 2), gate_k=2, k=2)
    upscaled = upscale(base, experts_of(base, 2), gate_k=2, k=2, exclude_modules=["attention.*"])
    assert isinstance(upscaled.out, SmileLinear)


def test_layers_that_compute_more_than_their_type_are_refused():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    base = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match=r"0 is a Scaled, which computes more than Linear .* exclude_modules=\['0'\]"):
        upscale(base, experts_of(base, 2), gate_k=2, k=2)


def test_an_upscaled_model_is_no_pretrained_model():
    base = mlp()
    once = upscale(base, experts_of(base), gate_k=2, k=4)
    with pytest.raises(PlanError, match="0 is a SmileLinear"):
        upscale(once, [copy.deepcopy(once)], gate_k=2, k=4)


def test_a_plan_describes_the_layers():
    plan = make_plan(mlp(), 3, SmileConfig(gate_k=4, k=16, exclude_modules=("3",)))
    (layer,) = plan.layers
    assert (layer.name, layer.in_features, layer.out_features, layer.k, layer.gate_k) == ("0", 20, 32, 16, 4)
    assert (layer.has_bias, layer.dtype, layer.routed_type, layer.rank) == (True, torch.float32, SmileLinear, 20)
    assert plan.kept_layers == ("3",)
    assert plan.other_tensors == ("1.weight", "1.bias", "3.weight")
    assert (plan.parameters, plan.bytes) == (count_parameters(mlp()), count_bytes(mlp()))
    convolutions = make_plan(resnet(), 3, SmileConfig(gate_k=2, k=4, convolutions=True))
    assert any(layer.routed_type is SmileConv2d for layer in convolutions.layers)


def test_ranks_are_factored_in_classes():
    (layer,) = make_plan(nn.Sequential(nn.Linear(90, 200)), 1, SmileConfig(gate_k=1, k=1)).layers
    assert [layer.rank_class(rank) for rank in (1, 31, 32, 33, 64, 65, 90)] == [32, 32, 32, 64, 64, 90, 90]
    assert layer.rank == 32


@pytest.mark.parametrize(
    "options", [{}, {"k": -1}, {"k": -1, "density": 0.1}, {"gate_k": 8, "k": 2}, {"routing_use_diff": False}]
)
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
def test_the_added_bytes_are_those_of_full_rank(options, experts, storage):
    base = mlp()
    options = {"gate_k": 2, "k": 4, "storage": storage, **options}
    plan = make_plan(base, experts, SmileConfig(**options))
    model = upscale(base, experts_of(base, experts), **options)
    assert count_bytes(model) - count_bytes(base) == plan.max_added_bytes
    assert plan.summary()["size of the result, at most"] == f"{count_bytes(model) / 1e6:.1f} MB"


@pytest.mark.parametrize(
    "options", [{}, {"k": -1}, {"k": -1, "density": 0.1}, {"gate_k": 8, "k": 2}, {"routing_use_diff": False}]
)
@pytest.mark.parametrize("experts", [1, 3])
def test_the_added_parameters_are_an_upper_bound(options, experts):
    base = mlp()
    options = {"gate_k": 2, "k": 4, **options}
    plan = make_plan(base, experts, SmileConfig(**options))
    added = plan.max_added_parameters
    model = upscale(base, experts_of(base, experts), **options)
    built = count_parameters(model) - count_parameters(base)
    assert built == added
    summary = plan.summary()
    assert summary["parameters added, at most"] == f"{added:,}"
    assert summary["experts"] == str(experts)
    assert summary["linear layers to upscale"] == "2"


def test_the_summary_of_a_budget():
    plan = make_plan(mlp(), 3, SmileConfig(gate_k=1, k=8))
    assert plan.budget_summary(SmileConfig(gate_k=1, k=8)) == {}
    summary = plan.budget_summary(SmileConfig(gate_k=1, k=8, param_ratio=2.0))
    assert summary["parameters added by param_ratio, at most"] == f"{plan.parameters:,}"
    assert summary["ranks"] == "known when the experts are factored, and logged"
    summary = plan.budget_summary(SmileConfig(gate_k=1, k=8, byte_ratio=1.5))
    assert summary["bytes added by byte_ratio, at most"] == f"{2 * plan.parameters:,}"
    for budget in ("param_ratio", "byte_ratio"):
        with pytest.raises(ConfigError, match=rf"{budget}=1\.01 is too little for the router rows"):
            plan.budget_summary(SmileConfig(gate_k=8, k=8, **{budget: 1.01}))


@pytest.mark.parametrize(("budget", "size"), [("param_ratio", 1), ("byte_ratio", 4)])
def test_reserved_parameters_are_taken_from_the_budget(budget: str, size: int):
    config = SmileConfig(gate_k=1, k=8, **{budget: 1.5})
    plan = make_plan(mlp(), 3, config)
    layers = [layer.spectra([[3.0, 2.0, 1.0]] * 3, [1] * 3, 0, config) for layer in plan.layers]
    least = sum(layer.min_cost for layer in layers)
    room = (plan.budget(config) - least) // size
    assert all(sum(ranks) > 3 for ranks in allocate_ranks(plan, layers, config))
    assert allocate_ranks(plan, layers, config, reserved=room) == [[1] * 3] * 2
    with pytest.raises(ConfigError, match=f"lower gate_k, or raise {budget}"):
        allocate_ranks(plan, layers, config, reserved=room + 1)


def test_the_estimated_time_is_that_of_each_shape_once():
    plan = make_plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)), 5, SmileConfig(gate_k=2, k=4))
    factored: list[tuple[tuple[int, ...], int]] = []

    def factor(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        factored.append((tuple(matrix.shape), rank))
        return ()

    assert estimate_seconds(plan, factor, factor, workers=2) > 0
    assert sorted(factored) == [((4, 8), 4)] * 2 + [((8, 8), 8)] * 2  # the least rank is 32
