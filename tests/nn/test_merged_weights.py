"""Weights that one choice of experts is added to, and how long they are kept."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import clip_tower, experts_of, output, tied_llama
from layers import RAGGED, UNIFORM, random_layer
from torch import Tensor, nn

from fusion_bench_smile import as_expert, upscale, use_experts
from fusion_bench_smile.nn import (
    DENSE,
    ExpertLayout,
    MergedWeights,
    RoutedLayer,
    SmileConv2d,
    merge,
    routed_layers,
    router_of,
)

LAYOUTS = [UNIFORM, RAGGED, ExpertLayout(ranks=(DENSE, 0, DENSE), gate_ranks=(2, 0, 2))]
CHOICES = [(), ((1, 1.0),), ((0, 0.75), (2, 0.25))]


def expected(layer: RoutedLayer, choice: tuple[tuple[int, float], ...]) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.clone(), layer.bias.clone()
    for expert, share in choice:
        if layer.layout.ranks[expert] == DENSE:
            weight += share * layer.rows("dense", expert)[0]
        elif layer.layout.ranks[expert]:
            weight += share * layer.rows("up", expert).mT @ layer.directions(expert)
        if layer.expert_bias is not None:
            bias += share * layer.expert_bias[expert]
    return weight, bias


@torch.no_grad()
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_parameters_are_the_weighted_sum(layout: ExpertLayout, choice: tuple[tuple[int, float], ...]) -> None:
    layer = random_layer(layout, 6, 5)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(merge(layer, choice), expected(layer, choice), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@torch.no_grad()
def test_a_convolution_with_channels_last_is_merged() -> None:
    """Its weight as a matrix is a copy, not a view."""
    base = nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="input", convolutions=True)
    (layer,) = routed_layers(model).values()
    assert isinstance(layer, SmileConv2d)
    change = layer.rows("up", 1).mT @ layer.directions(1)
    torch.testing.assert_close(merge(layer, ((1, 1.0),))[0].flatten(1), layer.weight.flatten(1) + change)


@torch.no_grad()
def test_weights_are_kept_until_the_layer_changes() -> None:
    layer, choice, kept = random_layer(UNIFORM, 6, 5), CHOICES[2], MergedWeights()
    first = kept.get(layer, choice)
    assert kept.get(layer, choice) is first
    for change in (
        lambda: layer.up.mul_(2),
        lambda: layer.expert_bias.add_(1) if layer.expert_bias is not None else layer.bias.add_(1),
        lambda: layer.load_state_dict(random_layer(UNIFORM, 6, 5).state_dict()),
        lambda: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
        lambda: layer.half().double(),
    ):
        change()
        torch.testing.assert_close(kept.get(layer, choice), expected(layer, choice), rtol=1e-12, atol=1e-12)
    assert kept.num_bytes == layer.weight.nbytes


@torch.no_grad()
def test_the_least_recently_used_choice_is_dropped_first() -> None:
    layers, choices = [random_layer(UNIFORM, 6, 5) for _ in range(2)], [((e, 1.0),) for e in range(3)]
    kept = MergedWeights(max_bytes=4 * layers[0].weight.nbytes)
    one, two = ([kept.get(layer, choice) for layer in layers] for choice in choices[:2])
    assert kept.get(layers[0], choices[0]) is one[0]  # the second choice is the oldest now
    kept.get(layers[0], choices[2])
    assert kept.get(layers[1], choices[0]) is one[1]
    assert kept.get(layers[0], choices[1]) is not two[0]
    small = MergedWeights(max_bytes=layers[0].weight.nbytes)
    assert small.get(layers[0], choices[0]) is not None
    assert small.get(layers[1], choices[0]) is None
    assert small.num_bytes == layers[0].weight.nbytes


@torch.no_grad()
def test_copies_and_files_hold_no_merged_weights() -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, routing_scope="input")
    inputs = {"pixel_values": torch.randn(2, 3, 28, 28)}
    with as_expert(model, "1"):
        result = output(model, inputs)
    assert router_of(model).merged_weights.num_bytes > 0
    twin = copy.deepcopy(model)
    assert router_of(twin).merged_weights.num_bytes == 0
    with as_expert(twin, "1"):
        assert torch.equal(output(twin, inputs), result)
    buffer = io.BytesIO()
    torch.save(router_of(model).merged_weights, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).num_bytes == 0


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_generation_decodes_with_merged_weights(top_k: int) -> None:
    base = tied_llama()
    experts = experts_of(base, scale=0.3)
    model = upscale(base, experts, k=8, gate_k=4, top_k=top_k, routing_scope="input")
    factored = upscale(base, experts, k=8, gate_k=4, top_k=top_k, routing_scope="input", execution="grouped")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for _ in range(3):
        prompt = torch.randint(1, 40, (1, 5))
        assert torch.equal(model.generate(prompt, **settings), factored.generate(prompt, **settings))
    weights = sum(layer.weight.nbytes for layer in routed_layers(model).values())
    assert router_of(model).merged_weights.num_bytes in {weights * choices for choices in (1, 2, 3)}
    pair = torch.randint(1, 40, (2, 5))  # two conversations, each with its choice
    assert torch.equal(model.generate(pair, **settings), factored.generate(pair, **settings))


@pytest.mark.parametrize("case", ["gradients", "bfloat16", "execution"])
def test_no_weights_are_merged(case: str) -> None:
    """Gradients reach the factors, and in bfloat16 a sum would be rounded by as much as the deltas."""
    base = clip_tower()
    options = {"execution": "grouped"} if case == "execution" else {}
    model = upscale(base, experts_of(base), k=4, routing_scope="input", **options)
    inputs = {"pixel_values": torch.randn(2, 3, 28, 28)}
    if case == "bfloat16":
        model, inputs = model.bfloat16(), {"pixel_values": inputs["pixel_values"].bfloat16()}
    with torch.set_grad_enabled(case == "gradients"), use_experts(model, torch.eye(3)[1]):
        result = model(**inputs).last_hidden_state
    assert router_of(model).merged_weights.num_bytes == 0
    if case == "gradients":
        result.sum().backward()
        assert all(layer.up.grad is not None for layer in routed_layers(model).values() if layer.up is not None)
