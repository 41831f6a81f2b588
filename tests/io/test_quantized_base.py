"""torchao quantizes the pretrained weights of an upscaled model; its experts stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output
from torch import nn

from fusion_bench_smile import (
    CheckpointError,
    PlanError,
    RoutedLayer,
    add_expert,
    as_expert,
    choose_experts,
    export_adapters,
    export_expert,
    remove_expert,
    save,
    upscale,
)
from fusion_bench_smile.nn import routed_layers

pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, quantize_

OPTIONS = [
    {"gate_k": 4, "k": 4},
    {"gate_k": 4, "k": 4, "routing_scope": "input", "top_k": 2, "storage": "int4"},
    {"gate_k": 4, "k": -1, "density": 0.2, "routing_scope": "input"},
]


def quantized(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_only_the_pretrained_weights_are_quantized(options: dict[str, object]) -> None:
    base, inputs = clip_tower(), clip_inputs()
    model = upscale(base, experts_of(base), **options).eval()
    before = {name: layer.up if layer.up is not None else layer.dense for name, layer in routed_layers(model).items()}
    expected, plain = output(model, inputs), output(base, inputs)
    quantized(model)
    for name, layer in routed_layers(model).items():
        assert isinstance(layer, RoutedLayer)
        assert type(layer.weight).__name__ == "Int8Tensor"
        assert (layer.up if layer.up is not None else layer.dense) is before[name]
    found = output(model, inputs)
    rounding = (output(quantized(clip_tower_like(base)), inputs) - plain).norm() / plain.norm()
    assert 0 < (found - expected).norm() / expected.norm() < 10 * rounding  # some tokens change their expert
    assert (found - expected).norm() < (plain - expected).norm()  # the experts have their effect


def clip_tower_like(base: nn.Module) -> nn.Module:
    other = clip_tower()
    other.load_state_dict(base.state_dict())
    return other


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_inputs_of_one_expert_alone_and_oracle_routing(options: dict[str, object]) -> None:
    base, inputs = clip_tower(), clip_inputs()
    model = quantized(upscale(base, experts_of(base), **options).eval())
    torch.testing.assert_close(choose_experts(model, **inputs).sum(dim=-1), torch.ones(6))
    together = output(model, inputs)
    for index in range(2):
        one = {"pixel_values": inputs["pixel_values"][index : index + 1]}
        torch.testing.assert_close(output(model, one), together[index : index + 1], rtol=1e-3, atol=1e-3)
    with as_expert(model, "1"):
        assert output(model, inputs).isfinite().all()


def test_what_needs_the_weights_is_refused(tmp_path: Path) -> None:
    base = clip_tower()
    model = quantized(upscale(base, experts_of(base), **OPTIONS[1]))
    line = r"weight is of class Int8Tensor, which can't be stored or changed: do this before the model is quantized"
    for action in (
        lambda: save(model, tmp_path / "saved"),
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: export_expert(model, "1", tmp_path / "one"),
        lambda: export_adapters(model, tmp_path / "adapters"),
        lambda: add_expert(model, experts_of(base)[0], "new"),
        lambda: remove_expert(model, "1"),
    ):
        with pytest.raises(CheckpointError, match=line):
            action()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        PlanError, match=r"is of class Int8Tensor, whose delta can't be computed: upscale the model first"
    ):
        upscale(quantized(base), experts_of(clip_tower()), gate_k=2, k=4)
