"""The routed layer against direct float64 algebra, token by token."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import clip_tower, experts_of, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import RAGGED, UNIFORM, UNIFORM_AND_RAGGED, random_layer, reference

from fusion_bench_smile import upscale
from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.nn import (
    DENSE,
    ExpertLayout,
    SmileLinear,
    count_bytes,
    count_parameters,
    layers_with_router,
    router_scores,
    select_experts,
)
from fusion_bench_smile.nn.routed import routed_layers


@st.composite
def layouts_and_options(draw: st.DrawFn) -> tuple[ExpertLayout, dict[str, object]]:
    experts = draw(st.integers(1, 5))
    dense = draw(st.booleans())
    ranks = [draw(st.integers(0, 5)) for _ in range(experts)]
    if dense:
        ranks = [DENSE if rank else 0 for rank in ranks]
    gate_ranks = [draw(st.integers(0, 6)) if experts > 1 else 0 for _ in range(experts)]
    top_k = draw(st.integers(1, experts))
    layout = ExpertLayout(
        ranks=tuple(ranks),
        gate_ranks=tuple(gate_ranks),
        shared_router=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
    )
    return layout, {"top_k": top_k, "execution": draw(st.sampled_from(["auto", "grouped", "masked"]))}


@settings(max_examples=150, deadline=None)
@given(case=layouts_and_options(), bias=st.booleans(), leading=st.lists(st.integers(0, 4), max_size=3))
def test_forward_is_the_formula(case, bias, leading):
    layout, options = case
    layer = random_layer(layout, 7, 5, bias, **options)
    x = torch.randn(*leading, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_scores_and_one_expert_for_all_tokens(execution, top_k):
    layout = ExpertLayout(ranks=(3,) * 4, gate_ranks=(2,) * 4, expert_bias=True)
    layer = random_layer(layout, 6, 5, top_k=top_k, execution=execution)
    with torch.no_grad():
        layer.gate[:2] *= 100  # expert 0 has all tokens
        layer.gate[4:] = layer.gate[2:4].repeat(2, 1)  # the scores of the other experts are equal
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize(("layout", "top_k"), UNIFORM_AND_RAGGED)
def test_gradients(layout, top_k, execution):
    layer = random_layer(layout, 6, 5, top_k=top_k, execution=execution)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    tensors = [x, *layer.parameters()]
    result = torch.autograd.grad(layer(x).square().sum(), tensors, allow_unused=True)
    expected = torch.autograd.grad(reference(layer, x).square().sum(), tensors, allow_unused=True)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_routes_like_float32(dtype):
    layout = ExpertLayout(ranks=(8,) * 6, gate_ranks=(4,) * 6)
    layer = random_layer(layout, 64, 32, dtype=dtype)
    x = torch.randn(500, 64).to(dtype)
    exact = copy.deepcopy(layer).double()
    same = (router_scores(layer, x).argmax(-1) == router_scores(exact, x.double()).argmax(-1)).double().mean()
    assert same == 1.0
    assert router_scores(layer, x).dtype == torch.float32
    assert layer(x).dtype == dtype


def test_scores_stay_float32_under_autocast():
    layer = random_layer(ExpertLayout(ranks=(8,) * 6, gate_ranks=(4,) * 6), 64, 32, dtype=torch.float32)
    x = torch.randn(500, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router_scores(layer, x).argmax(-1)
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(inside, router_scores(layer, x).argmax(-1))


def test_a_new_layer_computes_what_the_plain_layer_does():
    layer = SmileLinear(6, 5, True, UNIFORM, SmileConfig(top_k=2))
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("layout", "top_k"), UNIFORM_AND_RAGGED)
def test_copies_compute_the_same(layout, top_k):
    layer = random_layer(layout, 6, 5, top_k=top_k)
    x = torch.randn(9, 6, dtype=torch.float64)
    fresh = SmileLinear(6, 5, True, layout, layer.smile_config, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(copied(x), layer(x))


def test_weights_sum_to_one():
    layer = random_layer(UNIFORM, 6, 5, top_k=2)
    experts, weights = select_experts(router_scores(layer, torch.randn(50, 6, dtype=torch.float64)), 2)
    assert experts.shape == weights.shape == (50, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50, dtype=torch.float64))


def test_non_contiguous_input():
    layer = random_layer(UNIFORM, 6, 5, top_k=2)
    x = torch.randn(6, 9, dtype=torch.float64).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_exports_with_any_number_of_tokens():
    """The operations do not depend on the tokens: one graph for any batch, no host synchronisation."""
    layer = random_layer(UNIFORM, 6, 5, top_k=2)
    exported = torch.export.export(
        layer, (torch.randn(4, 6, dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim("tokens")},)
    )
    x = torch.randn(11, 6, dtype=torch.float64)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("storage", ["same", "int8"])
def test_the_rows_of_one_expert_are_its_part_of_all_rows(storage):
    layer = random_layer(RAGGED, 6, 5, storage=storage)
    for name, sizes in RAGGED.rows.items():
        everything = layer.rows(name)
        for expert, rows in enumerate(split_or_none(everything, sizes)):
            result = layer.rows(name, expert)
            assert (result is None) == (rows is None)
            assert rows is None or torch.equal(result, rows)
    assert [None if d is None else tuple(d.shape) for d in map(layer.directions, range(3))] == [(4, 6), None, (2, 6)]


def split_or_none(everything: torch.Tensor | None, sizes: tuple[int, ...]) -> list[torch.Tensor | None]:
    if everything is None:
        return [None] * len(sizes)
    return [rows if len(rows) else None for rows in everything.split(list(sizes))]


def test_from_a_plain_layer_and_back():
    plain = torch.nn.Linear(6, 5)
    layer = SmileLinear.from_layer(plain, UNIFORM, SmileConfig())
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    again = layer.to_plain_layer()
    assert type(again) is torch.nn.Linear
    assert again.weight is plain.weight
    assert vars(again).keys() == vars(plain).keys()
    assert again.state_dict().keys() == plain.state_dict().keys()


def test_the_representation_names_ranks_and_experts():
    text = repr(random_layer(RAGGED, 6, 5))
    assert text == (
        "SmileLinear(in_features=6, out_features=5, bias=True, experts=3, top_k=1, ranks=[4, 0, 2], "
        "gate_ranks=[2, 0, 3])"
    )
    assert "ranks=4, gate_ranks=2" in repr(random_layer(UNIFORM, 6, 5))


def test_hooks_receive_the_input_scores_experts_and_weights_until_they_are_removed():
    layer = random_layer(UNIFORM, 6, 5, top_k=2)
    first, second = [], []
    handle = layer.register_routing_hook(first.append)
    layer.register_routing_hook(second.append)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layer(x)
    handle.remove()
    layer(x)
    assert (len(first), len(second)) == (1, 2)
    (event,) = first
    assert torch.equal(event.inputs, x)
    assert torch.equal(event.scores, router_scores(layer, x))
    assert torch.equal(event.experts, event.scores.topk(2).indices)
    torch.testing.assert_close(event.weights, event.scores.topk(2).values.softmax(-1))
    assert not any(tensor.requires_grad for tensor in event)


def test_counts_are_of_all_parameters_once():
    base = mlp()
    assert count_parameters(base) == 20 * 32 + 32 + 2 * 32 + 32 * 12
    assert count_bytes(base) == 4 * count_parameters(base)
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    assert count_parameters(model) == sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(torch.nn.Sequential(base[0], torch.nn.ReLU(), base[0])) == 20 * 32 + 32
    assert count_bytes(base.half()) == 2 * count_parameters(base)


def test_layers_with_a_router_are_those_of_several_experts():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    assert list(layers_with_router(model)) == list(routed_layers(model)) == [
        name for name, module in model.named_modules() if isinstance(module, SmileLinear)
    ]  # fmt: skip
    alone = upscale(base, experts_of(base, 1), k=4, gate_k=2)
    assert routed_layers(alone)
    assert not layers_with_router(alone)
