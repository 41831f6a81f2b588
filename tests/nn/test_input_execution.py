"""The executions of a layer where whole inputs have their experts: they agree, and the cheapest one is used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import RAGGED, UNIFORM, random_layer
from torch import Tensor

from fusion_bench_smile.nn import DENSE, ExpertLayout, RoutedLayer
from fusion_bench_smile.nn.input_execution import batched_inputs, execution_of, grouped_inputs, masked_inputs
from fusion_bench_smile.nn.routing_state import RoutingState

LAYOUTS = {
    "uniform": UNIFORM,
    "ragged": RAGGED,
    "router apart": ExpertLayout(ranks=(3, 3, 3), gate_ranks=(2, 2, 2), shared_router=False, expert_bias=True),
    "ragged directions": ExpertLayout(ranks=(4, 4, 4), gate_ranks=(1, 4, 2), expert_bias=True),
    "ragged ranks": ExpertLayout(ranks=(1, 5, 3), gate_ranks=(2, 2, 2)),
}


def weights_of(inputs: int, experts: int, served: int) -> Tensor:
    """Weights (B, T) in float64 with `served` of each row other than zero, one of them below zero."""
    values = torch.rand(inputs, experts, dtype=torch.float64).add_(0.1)
    kept = values.topk(served, dim=-1).indices
    weights = torch.zeros_like(values).scatter(-1, kept, values.gather(-1, kept))
    weights[0] *= -1
    return weights


def outputs(layer: RoutedLayer, x: Tensor, weights: Tensor, served: int) -> dict[str, Tensor]:
    """The outputs by each execution."""
    state = RoutingState(num_inputs=len(weights), num_served=served)

    def plain() -> Tensor:
        return layer.plain_output(x, layer.weight, layer.bias)

    return {
        "masked": masked_inputs(layer, x, plain(), weights),
        "grouped": grouped_inputs(layer, x, plain(), weights, state.group_inputs(weights)),
        "batched": batched_inputs(layer, x, plain(), *state.served_inputs(weights)),
    }


@pytest.mark.parametrize("served", [1, 2])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 2, 3, 6)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_executions_are_the_dense_algebra(name: str, shape: tuple[int, ...], served: int) -> None:
    layer = random_layer(LAYOUTS[name], 6, 5, routing_scope="input")
    x, weights = torch.randn(shape, dtype=torch.float64), weights_of(4, 3, served)
    expected = []
    for row, tokens in zip(weights, x, strict=True):
        weight, bias = layer.weight.clone(), layer.bias.clone()
        for expert, share in enumerate(row):
            if layer.layout.ranks[expert]:
                weight += share * layer.rows("up", expert).mT @ layer.directions(expert)
            if layer.expert_bias is not None:
                bias += share * layer.expert_bias[expert]
        expected.append(torch.nn.functional.linear(tokens, weight, bias))
    for output in outputs(layer, x, weights, served).values():
        torch.testing.assert_close(output, torch.stack(expected), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    gate_rank=st.integers(1, 5),
    inputs=st.integers(1, 4),
    tokens=st.integers(1, 4),
    bias=st.booleans(),
    data=st.data(),
)
def test_all_executions_agree_for_any_ranks(ranks, gate_rank, inputs, tokens, bias, data):
    if not any(ranks):
        ranks[0] = 1
    layout = ExpertLayout(ranks=tuple(ranks), gate_ranks=(gate_rank,) * len(ranks), expert_bias=bias)
    layer = random_layer(layout, 7, 5, routing_scope="input")
    served = data.draw(st.integers(1, len(ranks)))
    x = torch.randn(inputs, tokens, 7, dtype=torch.float64)
    results = outputs(layer, x, weights_of(inputs, len(ranks), served), served)
    for name in ("grouped", "batched"):
        torch.testing.assert_close(results[name], results["masked"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
def test_batched_products_in_half_precision(autocast: bool) -> None:
    layer = random_layer(UNIFORM, 6, 5, dtype=torch.float32, routing_scope="input")
    x, weights = torch.randn(4, 5, 6), weights_of(4, 3, 2).float()
    expected = outputs(layer, x, weights, 2)["batched"]
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = outputs(layer, x, weights, 2)["batched"]
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.3)


def test_all_executions_have_the_same_gradients() -> None:
    layer = random_layer(UNIFORM, 6, 5, routing_scope="input")
    x, weights = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True), weights_of(4, 3, 2)
    gradients = {}
    for name in ("masked", "grouped", "batched"):
        gradients[name] = torch.autograd.grad(
            outputs(layer, x, weights, 2)[name].square().sum(), [x, *layer.parameters()]
        )
    assert all(gradient.abs().sum() for gradient in gradients["masked"])
    for name in ("grouped", "batched"):
        torch.testing.assert_close(gradients[name], gradients["masked"], rtol=1e-9, atol=1e-9)


def test_the_cheapest_execution() -> None:
    def layer(rank: int = 8, experts: int = 8, **options: object) -> RoutedLayer:
        layout = ExpertLayout(ranks=(rank,) * experts, gate_ranks=(8,) * experts)
        return random_layer(layout, 384, 384, dtype=torch.float32, routing_scope="input", **options)

    x = torch.empty(50, 17, 384)
    assert execution_of(layer(), x, 2) == "batched"
    assert execution_of(layer(), x, None) == "masked"  # the number of experts of an input is unknown
    assert execution_of(layer(), x[:, :1], 2) == "masked"  # gathering pays for several tokens alone
    assert execution_of(layer(experts=2), x, 2) == "masked"
    assert execution_of(layer(rank=128), x, 2) == "grouped"
    assert execution_of(layer(rank=128), x.to("meta"), 2) == "batched"  # without waiting for the sizes of groups
    assert execution_of(layer(execution="masked"), x, 2) == "masked"
    assert execution_of(layer(execution="grouped", rank=128), x[:, :1], None) == "grouped"
    assert execution_of(layer(rank=DENSE), x, 2) == "grouped"
