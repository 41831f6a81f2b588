"""Routing by task against the scores of the layers, and router rows that coincide."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp
from torch import nn

from fusion_bench_smile import SmileLinear, upscale
from fusion_bench_smile.analysis import (
    ModelCall,
    coinciding_gates,
    confusion,
    layer_accuracy,
    layer_load,
    routing_by_task,
    token_choices,
)
from fusion_bench_smile.nn import router_scores


def clip_calls(count: int = 2) -> list[ModelCall]:
    return [ModelCall((), clip_inputs()) for _ in range(count)]


def first_routed_layer(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, SmileLinear))


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_by_task_is_the_choice_of_the_layers(top_k):
    base = clip_tower()
    names = ("a", "b", "c")
    model = upscale(base, dict(zip(names, experts_of(base), strict=True)), k=4, gate_k=4, top_k=top_k)
    calls = {"a": clip_calls(), "elsewhere": clip_calls(1)}
    table = routing_by_task(model, calls, names)
    layer = first_routed_layer(model)
    recorded = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: recorded.append(router_scores(module, args[0]).flatten(0, -2))
    )
    for call in calls["a"]:
        call(model)
    handle.remove()
    scores = torch.cat(recorded).double()
    kept, experts = scores.topk(top_k)
    expected = torch.zeros(3, dtype=torch.float64).index_add_(0, experts.flatten(), kept.softmax(-1).flatten())
    rows = table[(table["layer"] == layer) & (table["task"] == "a")]
    assert rows["expert"].tolist() == list(names)
    np.testing.assert_allclose(rows["share"], (expected / expected.sum()).numpy(), atol=1e-5)
    probabilities = scores.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean() / np.log(3)
    np.testing.assert_allclose(rows["entropy"], float(entropy), atol=1e-5)
    matrix = confusion(table)
    assert matrix.index.tolist() == ["a", "elsewhere"]
    assert matrix.columns.tolist() == list(names)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(layer_load(table).sum(axis=1), 1, atol=1e-6)
    assert layer_accuracy(table)[layer] == pytest.approx(rows["share"].iloc[0])


def test_a_router_that_separates_the_tasks_is_always_right():
    """Expert a reacts to the first input features alone, expert b to the last ones."""
    base = nn.Sequential(nn.Linear(20, 8)).eval()
    experts, inputs = {}, {}
    for name, columns in (("a", slice(0, 4)), ("b", slice(16, 20))):
        experts[name] = copy.deepcopy(base)
        x = torch.zeros(5, 20)
        x[:, columns] = torch.randn(5, 4)
        inputs[name] = [ModelCall((x,), {})]
        with torch.no_grad():
            experts[name][0].weight[:, columns] += torch.randn(8, 4)
    table = routing_by_task(upscale(base, experts, k=4, gate_k=4), inputs, ("a", "b"))
    np.testing.assert_allclose(confusion(table), np.eye(2))
    assert layer_accuracy(table).tolist() == [1.0]


def test_gates_that_coincide_are_named(caplog):
    base = mlp()
    expert, other = experts_of(base, 2)
    double = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, start, end in zip(double.parameters(), base.parameters(), expert.parameters(), strict=True):
            parameter.copy_(start + 2 * (end - start))  # the same task vector, twice as large
    model = upscale(base, {"one": expert, "other": other, "double": double}, k=2, gate_k=2)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        table = coinciding_gates(model, ("one", "other", "double"))
    same = table[(table["first"] == "one") & (table["second"] == "double")]
    assert len(same) == 2
    assert (same["cosine"] > 0.999).all()
    assert (table.drop(same.index)["cosine"] < 0.9).all()
    assert [r.message for r in caplog.records if "one and double nearly coincide" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == len(same)


def test_the_choice_of_every_token():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=4)
    choices = token_choices(model, clip_calls(1)[0], first_routed_layer(model))
    assert choices.shape[0] == 6
    assert choices.ndim == 2
    assert set(choices.unique().tolist()) <= {0, 1, 2}
