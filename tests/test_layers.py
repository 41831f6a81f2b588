"""SmileLinear against direct float64 algebra, token by token."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench_smile.layers import DENSE, SmileLayout, SmileLinear


def random_layer(layout: SmileLayout, n_in: int, n_out: int, bias: bool = True, dtype=torch.float64) -> SmileLinear:
    layer = SmileLinear(n_in, n_out, bias, layout, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return layer


def split(tensor: Tensor | None, sizes: tuple[int, ...]) -> list[Tensor | None]:
    return [None] * len(sizes) if tensor is None else list(tensor.split(list(sizes)))


def reference(layer: SmileLinear, x: Tensor) -> Tensor:
    """The formula of the paper, one token at a time, in float64."""
    layout, flat = layer.layout, x.reshape(-1, layer.in_features).double()
    gate, rest = split(layer.gate, layout.gate_ranks), split(layer.down, layout.down_rows)
    up = split(layer.up, layout.low_ranks)
    outputs = []
    for token in flat:
        scores = torch.stack(
            [
                (g[:r].double() @ token).norm() if g is not None else token.new_zeros(())
                for g, r in zip(gate, layout.gate_ranks, strict=True)
            ]
        )
        chosen = scores.topk(layout.top_k).indices.tolist()
        if not any(layout.gate_ranks):
            chosen = list(range(layout.num_experts))
        probabilities = torch.softmax(scores, 0)
        total = sum(probabilities[i] for i in chosen)
        y = layer.weight.double() @ token + (0 if layer.bias is None else layer.bias.double())
        for i in chosen:
            w = probabilities[i] / total
            if layout.ranks[i] == DENSE:
                y = y + w * (layer.dense[layout.dense_experts.index(i)].double() @ token)
            elif layout.ranks[i] > 0:
                k = layout.ranks[i]
                own = [] if gate[i] is None or not layout.shared_router else [gate[i][:k]]
                down = torch.cat([*own, *([] if rest[i] is None else [rest[i]])]).double()
                y = y + w * ((down @ token) @ up[i].double())
            if layer.expert_bias is not None:
                y = y + w * layer.expert_bias[i].double()
        outputs.append(y)
    if not outputs:
        return flat.new_zeros(*x.shape[:-1], layer.out_features)
    return torch.stack(outputs).reshape(*x.shape[:-1], layer.out_features)


@st.composite
def layouts(draw) -> SmileLayout:
    experts = draw(st.integers(1, 5))
    dense = draw(st.booleans())
    ranks = [draw(st.integers(0, 5)) for _ in range(experts)]
    if dense:
        ranks = [DENSE if rank else 0 for rank in ranks]
    gates = [draw(st.integers(0, 6)) if experts > 1 else 0 for _ in range(experts)]
    return SmileLayout(
        ranks=tuple(ranks),
        gate_ranks=tuple(gates),
        top_k=draw(st.integers(1, experts)),
        shared_router=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        execution=draw(st.sampled_from(["auto", "grouped", "masked"])),
    )


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), bias=st.booleans(), leading=st.lists(st.integers(0, 4), max_size=3))
def test_forward_is_the_formula(layout, bias, leading):
    layer = random_layer(layout, 7, 5, bias)
    x = torch.randn(*leading, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_ties_and_one_expert_for_all_tokens(execution, top_k):
    layout = SmileLayout(ranks=(3,) * 4, gate_ranks=(2,) * 4, top_k=top_k, expert_bias=True, execution=execution)
    layer = random_layer(layout, 6, 5)
    with torch.no_grad():
        layer.gate[:2] *= 100  # expert 0 has all tokens
        layer.gate[4:] = layer.gate[2:4].repeat(2, 1)  # the others tie
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)


UNIFORM = SmileLayout(ranks=(4, 4, 4), gate_ranks=(2, 2, 2), top_k=2, expert_bias=True)
RAGGED = SmileLayout(ranks=(4, 0, 2), gate_ranks=(2, 0, 3), top_k=1)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("layout", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_gradients(layout, execution):
    layer = random_layer(replace(layout, execution=execution), 6, 5)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    tensors = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), tensors, allow_unused=True)
    theirs = torch.autograd.grad(reference(layer, x).square().sum(), tensors, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_routes_like_float32(dtype):
    layout = SmileLayout(ranks=(8,) * 6, gate_ranks=(4,) * 6)
    layer = random_layer(layout, 64, 32, dtype=dtype)
    x = torch.randn(500, 64).to(dtype)
    exact = copy.deepcopy(layer).double()
    same = (layer.scores(x).argmax(-1) == exact.scores(x.double()).argmax(-1)).double().mean()
    assert same == 1.0
    assert layer.scores(x).dtype == torch.float32
    assert layer(x).dtype == dtype


def test_scores_stay_float32_under_autocast():
    layer = random_layer(SmileLayout(ranks=(8,) * 6, gate_ranks=(4,) * 6), 64, 32, dtype=torch.float32)
    x = torch.randn(500, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.scores(x).argmax(-1)
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(inside, layer.scores(x).argmax(-1))


def test_a_new_layer_is_the_pretrained_one():
    layer = SmileLinear(6, 5, True, UNIFORM)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("layout", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_copies_compute_the_same(layout):
    layer = random_layer(layout, 6, 5)
    x = torch.randn(9, 6, dtype=torch.float64)
    fresh = SmileLinear(6, 5, True, SmileLayout.from_dict(layout.to_dict()), dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(copied(x), layer(x))


def test_weights_sum_to_one():
    layer = random_layer(UNIFORM, 6, 5)
    chosen, weights = layer.chosen(layer.scores(torch.randn(50, 6, dtype=torch.float64)))
    assert chosen.shape == weights.shape == (50, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50, dtype=torch.float64))


def test_non_contiguous_input():
    layer = random_layer(UNIFORM, 6, 5)
    x = torch.randn(6, 9, dtype=torch.float64).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_compiles_without_graph_breaks():
    """What runs does not depend on the tokens: one graph for any batch, no host synchronisation."""
    layer = random_layer(UNIFORM, 6, 5)
    exported = torch.export.export(
        layer, (torch.randn(4, 6, dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim("tokens")},)
    )
    x = torch.randn(11, 6, dtype=torch.float64)
    torch.testing.assert_close(exported.module()(x), layer(x))
