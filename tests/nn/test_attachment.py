"""A router for whole inputs at the entry points of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, mlp_inputs, output, t5, t5_inputs, tied_llama
from torch import nn
from transformers import CLIPVisionModel

from fusion_bench_smile import upscale
from fusion_bench_smile.nn import (
    ROUTER_NAME,
    InputRouter,
    RoutedLayer,
    attach_router,
    deciding_module,
    detach_router,
    entry_points,
    router_of,
)


def layers(model: nn.Module) -> list[RoutedLayer]:
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def test_with_one_choice_for_each_token_there_is_no_router() -> None:
    tower = clip_tower()
    model = upscale(tower, experts_of(tower), k=4, gate_k=2)
    assert router_of(model) is None
    assert not hasattr(model, ROUTER_NAME)
    assert all(layer.input_router is None for layer in layers(model))


def test_inputs_may_enter_through_the_wrapped_vision_model() -> None:
    tower = clip_tower()
    model: CLIPVisionModel = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="input")
    inputs = clip_inputs()
    inner = getattr(model, "vision_model", model)
    with torch.no_grad():
        torch.testing.assert_close(inner(**inputs).pooler_output, model(**inputs).pooler_output)


def test_the_entry_points_of_the_architectures() -> None:
    towers, encoder_decoder, decoder = clip_tower(), t5(), tied_llama()
    options = {"k": 4, "gate_k": 2, "routing_scope": "input"}
    model = upscale(towers, experts_of(towers), **options)
    assert set(entry_points(model).values()) == {"model"}
    assert [type(module).__name__ for module in entry_points(model)][:2] == ["CLIPVisionModel", "CLIPVisionTransformer"]
    model = upscale(encoder_decoder, experts_of(encoder_decoder), **options)
    assert entry_points(model)[model] == "encoder_decoder"
    assert entry_points(model)[model.get_encoder()] == "encoder"
    assert deciding_module(model) is model.get_encoder()
    model = upscale(decoder, experts_of(decoder), **options)
    assert list(entry_points(model)) == [model]  # the head is routed too, and lies outside of the inner model
    model = upscale(decoder, experts_of(decoder), exclude_modules=["lm_head"], **options)
    assert list(entry_points(model))[:2] == [model, model.model]


def test_a_copy_has_its_router() -> None:
    tower = clip_tower()
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="input")
    other = copy.deepcopy(model)
    inputs, other_inputs = clip_inputs(), clip_inputs()
    expected = output(model, inputs)
    output(other, other_inputs)
    torch.testing.assert_close(output(other, inputs), expected)
    assert router_of(other) is not router_of(model)
    assert all(layer.input_router is router_of(other) for layer in layers(other))


def test_after_an_error_the_next_call_works() -> None:
    tower = clip_tower()
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="input")
    inputs = clip_inputs()
    before = output(model, inputs)
    with pytest.raises((RuntimeError, ValueError)):  # the model's error for images of another size
        output(model, {"pixel_values": torch.randn(2, 3, 5, 5)})
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize(("make", "inputs"), [(clip_tower, clip_inputs), (t5, t5_inputs), (mlp, mlp_inputs)])
def test_a_detached_router_leaves_nothing_behind(make, inputs) -> None:
    base, x = make(), inputs()
    plain = upscale(base, experts_of(base), k=4, gate_k=2)
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="input")
    router = router_of(model)
    expected = output(model, x)
    detach_router(model)
    assert router_of(model) is None
    assert all(layer.input_router is None for layer in layers(model))
    assert not any({"forward", "generate"} & module.__dict__.keys() for module in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(output(model, x), output(plain, x))
    attach_router(model, InputRouter(router.smile_config, router.experts))
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("parts", ["model", "layers"])
def test_compilation_does_not_change_the_output(parts: str) -> None:
    tower = clip_tower()
    model, inputs = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="input"), clip_inputs()
    expected = output(model, inputs)
    assert not torch.allclose(output(tower, inputs), expected)
    for module in (model,) if parts == "model" else model.vision_model.encoder.layers:
        module.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(output(model, inputs), expected)
