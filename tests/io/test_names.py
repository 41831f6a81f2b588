"""Modules and weights with several names, in models that are not of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import experts_of
from safetensors.torch import save_model
from torch import nn

from fusion_bench_smile import CheckpointError, load, save, upscale
from fusion_bench_smile.nn import RoutedLayer


class Twice(nn.Module):
    """Two layers that are called one after the other: one module, two with the same weight, or two of their own."""

    def __init__(self, first: str, tied: str) -> None:
        super().__init__()
        self.first, self.layers = first, nn.ModuleDict({first: nn.Linear(12, 12)})
        second = self.layers[first] if tied == "module" else nn.Linear(12, 12)
        if tied == "weight":
            second.weight = self.layers[first].weight
        self.layers["m"] = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers["m"](self.layers[self.first](x).relu())


@pytest.mark.parametrize("first", ["a", "z"])  # safetensors stores the first name of a tensor in alphabetical order
@pytest.mark.parametrize("tied", ["module", "weight", "nothing"])
@pytest.mark.parametrize("options", [{}, {"storage": "int8"}, {"storage": "int4", "routing_scope": "input"}])
def test_all_names_come_back(first: str, tied: str, options: dict, tmp_path: Path) -> None:
    base = Twice(first, tied)
    model = upscale(base, experts_of(base, 2, scale=0.3), gate_k=2, k=12, **options)
    x = torch.randn(4, 3, 12)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", base)
    assert torch.equal(loaded(x), model(x))
    assert (loaded(x) - base(x)).abs().max() > 0.01
    one, two = loaded.layers[first], loaded.layers["m"]
    assert isinstance(one, RoutedLayer)
    assert isinstance(two, RoutedLayer)
    assert (one is two) == (tied == "module")
    assert (one.weight is two.weight) == (tied != "nothing")


def test_experts_that_are_stored_under_another_name(tmp_path: Path) -> None:
    base = Twice("z", "module")
    experts = experts_of(base, 2)
    for number, expert in enumerate(experts):
        save_model(expert, str(tmp_path / f"{number}.safetensors"))
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    x = torch.randn(5, 12)
    expected, streamed = (upscale(base, each, gate_k=2, k=4)(x) for each in (experts, files))
    assert torch.equal(expected, streamed)


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ("nothing", "weight", r"layers\.m\.weight, which are one tensor|layers\.a\.weight, which are one tensor"),
        ("nothing", "module", "which are one tensor in the given model: give the pretrained model"),
        ("weight", "nothing", r"lacks 1 of \d+ tensors"),
        ("module", "nothing", r"lacks \d+ of \d+ tensors"),
    ],
)
def test_a_model_with_other_names_is_refused(saved: str, given: str, message: str, tmp_path: Path) -> None:
    base = Twice("a", saved)
    save(upscale(base, experts_of(base, 2), gate_k=2, k=4), tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", Twice("a", given))
