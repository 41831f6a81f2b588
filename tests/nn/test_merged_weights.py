"""Weights that one choice of experts is added to, and how long they are kept."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.prune as prune
from conftest import clip_tower, experts_of, output, tied_llama
from layers import RAGGED, UNIFORM, random_layer
from torch import Tensor, nn

from fusion_bench_smile import as_expert, choose_experts, upscale, use_experts
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
    assert not kept.announce(choice)
    assert kept.get(layer, choice) is None
    first = kept.add(layer, choice)
    assert kept.get(layer, choice) is first
    for change in (
        lambda: layer.up.mul_(2),
        lambda: layer.bias.add_(1),
        lambda: layer.load_state_dict(random_layer(UNIFORM, 6, 5).state_dict()),
        lambda: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
        lambda: layer.half().double(),
        lambda: prune.random_unstructured(layer, "weight", 0.3),
        lambda: prune.random_unstructured(layer, "weight", 0.3),
    ):
        change()
        assert kept.get(layer, choice) is None
        torch.testing.assert_close(kept.add(layer, choice), expected(layer, choice), rtol=1e-12, atol=1e-12)
        assert kept.get(layer, choice) is not None
    assert kept.num_bytes == layer.weight.nbytes


@torch.no_grad()
def test_the_weights_of_one_choice_are_kept_within_a_bound() -> None:
    layers, choices = [random_layer(UNIFORM, 6, 5) for _ in range(2)], [((e, 1.0),) for e in range(2)]
    size = layers[0].weight.nbytes
    kept = MergedWeights(max_bytes=size)
    kept.announce(choices[0])
    assert kept.announce(choices[0])
    assert kept.add(layers[0], choices[0]) is not None
    assert kept.add(layers[1], choices[0]) is None  # it does not fit
    assert kept.add(layers[0], choices[1]) is None  # it was not announced
    assert kept.get(layers[0], choices[1]) is None
    assert kept.num_bytes == size
    assert not kept.announce(choices[1])
    assert kept.num_bytes == 0
    assert kept.add(layers[1], choices[1]) is not None
    kept.clear()
    assert kept.num_bytes == 0
    assert kept.get(layers[1], choices[1]) is None is kept.add(layers[1], choices[1])


def bytes_of_layers(model: nn.Module) -> int:
    return sum(layer.weight.nbytes for layer in routed_layers(model).values())


@torch.no_grad()
def test_copies_and_files_hold_no_merged_weights() -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, routing_scope="input")
    inputs = {"pixel_values": torch.randn(2, 3, 28, 28)}
    with as_expert(model, "1"):
        result = output(model, inputs)
        assert router_of(model).merged_weights.num_bytes == bytes_of_layers(model)
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(router_of(model).merged_weights, buffer)
    assert router_of(model).merged_weights.num_bytes == 0  # the block has ended
    assert router_of(twin).merged_weights.num_bytes == 0
    with as_expert(twin, "1"):
        assert torch.equal(output(twin, inputs), result)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).num_bytes == 0


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_generation_decodes_with_merged_weights(top_k: int, monkeypatch) -> None:
    base = tied_llama()
    experts = experts_of(base, scale=0.3)
    model = upscale(base, experts, k=8, gate_k=4, top_k=top_k, routing_scope="input")
    factored = upscale(base, experts, k=8, gate_k=4, top_k=top_k, routing_scope="input", execution="grouped")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    largest = []
    get = MergedWeights.get
    monkeypatch.setattr(MergedWeights, "get", lambda self, *a: (get(self, *a), largest.append(self.num_bytes))[0])
    for _ in range(3):
        prompt = torch.randint(1, 40, (1, 5))
        assert torch.equal(model.generate(prompt, **settings), factored.generate(prompt, **settings))
        assert router_of(model).merged_weights.num_bytes == 0  # the generation has ended
    assert max(largest) == bytes_of_layers(model)
    pair = torch.randint(1, 40, (2, 5))  # two conversations, each with its choice
    assert torch.equal(model.generate(pair, **settings), factored.generate(pair, **settings))


@torch.no_grad()
def test_conversations_in_turn_are_not_merged() -> None:
    """Otherwise each of their calls would merge anew."""
    base = tied_llama()
    model = upscale(base, experts_of(base, scale=0.3), k=8, gate_k=4, top_k=2, routing_scope="input")
    model(torch.randint(1, 40, (1, 5)))  # the first call examines the layers
    kept = router_of(model).merged_weights
    caches = [model(torch.randint(1, 40, (1, 5)), use_cache=True).past_key_values for _ in range(2)]
    for _ in range(2):
        for cache in caches:
            model(torch.tensor([[3]]), past_key_values=cache)
            assert kept.num_bytes == 0
    for _ in range(2):  # one of them goes on alone
        model(torch.tensor([[3]]), past_key_values=caches[1])
    assert kept.num_bytes == bytes_of_layers(model)


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "execution", "meta"])
def test_no_weights_are_merged(case: str) -> None:
    """In bfloat16 a sum would be rounded by as much as the deltas."""
    base = clip_tower()
    options = {"execution": "grouped"} if case == "execution" else {}
    model = upscale(base, experts_of(base), k=4, routing_scope="input", **options)
    pixels = torch.randn(1, 3, 28, 28)
    if case == "bfloat16":
        model, pixels = model.bfloat16(), pixels.bfloat16()
    if case == "meta":
        model, pixels = model.to("meta"), pixels.to("meta")
    with torch.no_grad(), torch.autocast("cpu", enabled=case == "autocast"), use_experts(model, torch.eye(3)[1]):
        model(pixel_values=pixels)
        assert router_of(model).merged_weights.num_bytes == 0


@pytest.mark.parametrize("fused", [False, True])
def test_training_is_followed(fused: bool) -> None:
    """A fused optimizer changes parameters and not their versions."""
    base, inputs = clip_tower(), {"pixel_values": torch.randn(3, 3, 28, 28)}
    model = upscale(base, experts_of(base), k=4, gate_k=4, routing_scope="input")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    for _ in range(3):
        with as_expert(model, "1"):
            output(model, inputs)
            model(**inputs).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            result, choice = output(model, inputs), choose_experts(model, **inputs)
        with as_expert(twin := copy.deepcopy(model), "1"):
            torch.testing.assert_close(result, output(twin, inputs), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(choice, choose_experts(twin, **inputs))
    assert model.vision_model.encoder.layers[0].mlp.fc1.up.grad is None


@torch.no_grad()
def test_weights_that_are_given_are_copied() -> None:
    base, inputs = clip_tower(), {"pixel_values": torch.randn(2, 3, 28, 28)}
    model, weights = upscale(base, experts_of(base), k=4, routing_scope="input"), torch.eye(3)[1]
    with use_experts(model, weights):
        first = output(model, inputs)
        weights.zero_()
        assert torch.equal(output(model, inputs), first)


def test_a_model_can_be_vectorised_over_inputs() -> None:
    base, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(5, 6)
    model = upscale(base, experts_of(base), k=2, gate_k=2, routing_scope="input", top_k=2)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.func.vmap(lambda row: model(row[None])[0])(x), expected, rtol=1e-5, atol=1e-5)
