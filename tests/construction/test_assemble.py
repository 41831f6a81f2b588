"""Assembly of routed layers and of the router."""

from __future__ import annotations

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, output
from layers import UNIFORM, random_layer

from fusion_bench_smile import SmileConfig, metadata_of, upscale
from fusion_bench_smile.construction import set_routing
from fusion_bench_smile.construction.assemble import build_layer, set_averages
from fusion_bench_smile.nn import RoutedLayer, router_of


@pytest.mark.parametrize("trained", [True, False])
def test_a_built_layer_has_the_given_tensors(trained):
    config, plain = SmileConfig(top_k=2), torch.nn.Linear(6, 5).double().requires_grad_(trained)
    expected = random_layer(UNIFORM, 6, 5, top_k=2)
    tensors = {name: getattr(expected, name).detach() for name in ("gate", "down", "up", "expert_bias")}
    layer = build_layer(plain, UNIFORM, config, tensors)
    assert layer.weight is plain.weight
    assert layer.smile_config is config
    assert layer.dense is None
    assert all(torch.equal(getattr(layer, name), tensor) for name, tensor in tensors.items())
    assert all(getattr(layer, name).requires_grad == trained for name in tensors)
    expected.load_state_dict({**expected.state_dict(), **plain.state_dict()})
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(layer(x), expected(x))


def test_averages_are_sums_divided_by_the_number_of_experts():
    base = mlp()
    set_averages(base, {"1.weight": torch.full((32,), 6.0)}, 3)
    assert base[1].weight.tolist() == [2.0] * 32


@pytest.mark.parametrize("changed", [{"routing_scope": "input"}, {"routing_scope": "input", "top_k": 2}])
def test_another_routing_of_a_model_is_that_of_one_built_with_it(changed):
    base = clip_tower()
    options = {"gate_k": 2, "k": 4}
    model = upscale(base, experts_of(base), **options)
    expected = upscale(base, experts_of(base), **changed, **options)
    inputs = clip_inputs()
    config = SmileConfig(**changed, **options)
    set_routing(model, config, metadata_of(model).experts)
    assert router_of(model).smile_config is config
    assert all(layer.smile_config is config for layer in model.modules() if isinstance(layer, RoutedLayer))
    assert torch.equal(output(model, inputs), output(expected, inputs))
    set_routing(model, SmileConfig(**options), metadata_of(model).experts)
    assert router_of(model) is None
    assert torch.equal(output(model, inputs), output(upscale(base, experts_of(base), **options), inputs))
