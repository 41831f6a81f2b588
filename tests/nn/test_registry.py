"""The layer types that can be routed, in models of each type."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import convnext, experts_of, gpt2, resnet
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusion_bench_smile import load, upscale
from fusion_bench_smile.nn import (
    LAYER_TYPES,
    RoutedLayer,
    SmileConv1D,
    SmileConv2d,
    SmileLinear,
    plain_type_of,
    routed_type_of,
)

MODELS = {
    "gpt-2": (gpt2, lambda: {"input_ids": torch.arange(12).view(2, 6)}, {}),
    "resnet": (resnet, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, {"convolutions": True}),
    "convnext": (convnext, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, {"convolutions": True}),
}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_every_plain_type_has_its_routed_type():
    layers = {nn.Linear(3, 2): SmileLinear, Conv1D(2, 3): SmileConv1D, nn.Conv2d(3, 2, 1): SmileConv2d}
    assert len(LAYER_TYPES) == 3
    for plain, routed in layers.items():
        assert LAYER_TYPES[type(plain)] is routed_type_of(plain) is routed
        assert plain_type_of(plain) is routed.plain_type is type(plain)
    assert plain_type_of(type("Subclass", (nn.Linear,), {})(3, 2)) is nn.Linear
    assert plain_type_of(nn.LayerNorm(3)) is None


@pytest.mark.parametrize("kind", MODELS)
def test_a_single_expert_of_full_rank_is_the_expert(kind):
    make, inputs, options = MODELS[kind]
    base, x = make(), inputs()
    expert = copy.deepcopy(base)
    plain = (nn.Linear, Conv1D, *((nn.Conv2d,) if options else ()))
    with torch.no_grad():
        for name, module in expert.named_modules():
            # GPT-2's head is tied to the embedding, which is not routed
            if isinstance(module, plain) and getattr(module, "groups", 1) == 1 and name != "lm_head":
                module.weight += 0.05 * torch.randn_like(module.weight)
                if module.bias is not None:
                    module.bias += 0.05
    largest = max(min(module.weight.flatten(1).shape) for module in base.modules() if isinstance(module, plain))
    model = upscale(base, [expert], k=largest, gate_k=1, **options)
    assert any(isinstance(module, RoutedLayer) and not isinstance(module, SmileLinear) for module in model.modules())
    torch.testing.assert_close(logits(model, x), logits(expert, x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(model, x), logits(base, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_save_and_reload(name, tmp_path):
    make, inputs, options = MODELS[name]
    base, x = make(), inputs()
    model = upscale(base, experts_of(base), k=3, gate_k=2, top_k=2, **options)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved").eval(), x), logits(model, x))
