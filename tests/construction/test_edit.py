"""Adding and removing experts equals building the model with these experts."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, clip_inputs, clip_tower, experts_of, output, tied_llama
from torch import nn

from fusion_bench_smile import (
    ConfigError,
    PlanError,
    add_expert,
    dequantize,
    load,
    metadata_of,
    remove_expert,
    save,
    upscale,
)  # fmt: skip
from fusion_bench_smile.nn import count_parameters

OPTIONS = {
    "shared router": {"k": 4, "gate_k": 2},
    "router larger": {"k": 2, "gate_k": 4, "top_k": 2},
    "separate router": {"k": 4, "gate_k": 2, "routing_use_diff": False},
    "dense": {"k": -1, "gate_k": 2},
    "router of rank k": {"k": 4, "gate_k": None},
    "int4": {"k": 4, "gate_k": 2, "storage": "int4"},
    "dense int4": {"k": -1, "gate_k": 2, "storage": "int4"},
    "dropped": {"k": -1, "gate_k": 2, "density": 0.1},
    "dropped int4": {"k": -1, "gate_k": 2, "density": 0.3, "storage": "int4"},
    "some layers": {"k": 4, "gate_k": 2, "exclude_modules": ["*0*"]},
}


def named(base: nn.Module, count: int = 3) -> dict[str, nn.Module]:
    return dict(zip("abcdef", experts_of(base, count), strict=False))


def assert_same(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metadata_of(first).to_dict()["layers"] == metadata_of(second).to_dict()["layers"]
    assert metadata_of(first).experts == metadata_of(second).experts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "tied llama"])
def test_adding_and_removing_equal_building(architecture, options):
    base = tied_llama() if architecture == "tied llama" else ARCHITECTURES[architecture][0]()
    experts = named(base)
    three = upscale(base, experts, **options)
    before = copy.deepcopy(three.state_dict())
    two = upscale(base, {name: experts[name] for name in "ab"}, **options)
    assert_same(add_expert(two, experts["c"], "c"), three)
    assert_same(remove_expert(three, "c"), two)
    assert_same(remove_expert(three, "a"), upscale(base, {name: experts[name] for name in "bc"}, **options))
    assert all(torch.equal(three.state_dict()[name], before[name]) for name in before)


def test_from_one_expert_and_back():
    base = clip_tower()
    experts = named(base, 2)
    one = upscale(base, {"a": experts["a"]}, k=4, gate_k=2)
    two = upscale(base, experts, k=4, gate_k=2)
    assert_same(add_expert(one, experts["b"], "b"), two)
    assert_same(remove_expert(two, "b"), one)


def test_experts_that_changed_different_layers(tmp_path):
    base = clip_tower()
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        first.vision_model.encoder.layers[0].mlp.fc1.weight += 0.1 * torch.randn(48, 32)
        second.vision_model.encoder.layers[1].mlp.fc2.bias += 0.1 * torch.randn(32)
    both = upscale(base, {"a": first, "b": second, "same": base}, k=4, gate_k=2)
    built = upscale(base, {"a": first, "same": base}, k=4, gate_k=2)
    assert_same(
        add_expert(remove_expert(both, "b"), second, "b"),
        upscale(base, {"a": first, "same": base, "b": second}, k=4, gate_k=2),
    )
    assert_same(remove_expert(both, "b"), built)


def test_a_loaded_model_is_extended_and_saved_again(tmp_path):
    base = clip_tower()
    experts = named(base)
    upscale(base, {name: experts[name] for name in "ab"}, k=4, gate_k=2).save_pretrained(tmp_path / "two")
    three = add_expert(load(tmp_path / "two"), experts["c"], "c")
    assert_same(three, upscale(base, experts, k=4, gate_k=2))
    three.save_pretrained(tmp_path / "three")
    assert_same(load(tmp_path / "three"), three)


def test_changes_that_cannot_work_are_refused():
    base = clip_tower()
    experts = named(base)
    model = upscale(base, {name: experts[name] for name in "ab"}, k=4, gate_k=2, top_k=2)
    with pytest.raises(PlanError, match="there is an expert 'a' already; the experts are: a, b"):
        add_expert(model, experts["c"], "a")
    with pytest.raises(PlanError, match="there is no expert 'c'; the experts are: a, b"):
        remove_expert(model, "c")
    with pytest.raises(ConfigError, match="top_k=2 is more than the 1 experts"):
        remove_expert(model, "a")
    with pytest.raises(PlanError, match="expert 'c' has another architecture"):
        add_expert(model, nn.Linear(3, 4), "c")
    averaged = upscale(base, experts, k=4, gate_k=2, average_experts=True)
    with pytest.raises(PlanError, match="average_experts=true"):
        remove_expert(averaged, "a")
    narrow = upscale(base, {"a": experts["a"]}, k=2, gate_k=4)
    with pytest.raises(PlanError, match=r"was built for one expert and lacks the 4 directions"):
        add_expert(narrow, experts["b"], "b")
    with pytest.raises(PlanError, match="no experts"):
        remove_expert(narrow, "a")


@pytest.mark.parametrize("options", [{}, {"routing_scope": "input", "top_k": 2}])
@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
def test_factors_are_unpacked_once(storage: str, options: dict[str, object], tmp_path) -> None:
    base, inputs = clip_tower(), clip_inputs()
    model = upscale(base, experts_of(base), k=8, gate_k=4, storage=storage, **options)
    expected = output(model, inputs)
    assert dequantize(model) is model
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    assert torch.equal(output(model, inputs), expected)
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model"), inputs), expected)
    assert metadata_of(model).provenance.parameters[1] == count_parameters(model)
