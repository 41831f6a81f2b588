"""Captured calls and the blocks of a model."""

from __future__ import annotations

import pytest
import torch
from conftest import clip_tower, mlp, mlp_inputs
from torch import nn

from fusion_bench_smile.analysis import ModelCall, blocks, capture_calls, capture_outputs
from fusion_bench_smile.exceptions import SmileError


def test_calls_are_captured_and_the_evaluation_ends_there():
    model, evaluated = mlp(), []

    def evaluate(module: nn.Module) -> None:
        for number in range(100):
            evaluated.append(number)
            module(torch.full((2, 20), float(number)))

    calls = capture_calls(model, evaluate, 3)
    assert [float(call.args[0][0, 0]) for call in calls] == [0, 1, 2]
    assert len(evaluated) == 3
    assert torch.equal(calls[1](model), model(torch.ones(2, 20)))
    assert not model._forward_pre_hooks
    with pytest.raises(SmileError, match="didn't call the model"):
        capture_calls(model, lambda _: None, 1)
    with pytest.raises(ZeroDivisionError):
        capture_calls(model, lambda _: 1 / 0, 1)
    assert not model._forward_pre_hooks


def test_outputs_are_captured_in_the_order_of_the_calls():
    model, inputs = mlp(), mlp_inputs()["input"]
    with capture_outputs({"first": model[0]}) as outputs:
        model(inputs)
        model(2 * inputs)
    assert [torch.equal(out, model[0](x)) for out, x in zip(outputs["first"], (inputs, 2 * inputs), strict=True)] == [
        True,
        True,
    ]
    assert not model[0]._forward_hooks


def test_blocks_follow_each_other():
    tower = clip_tower()
    assert list(blocks(tower)) == [f"vision_model.encoder.layers.{n}" for n in range(tower.config.num_hidden_layers)]
    assert blocks(mlp()) == {}
    assert ModelCall((), mlp_inputs()).attention_mask is None
