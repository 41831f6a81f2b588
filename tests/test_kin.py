"""The linear layer's kin: GPT-2's transposed one, and convolutions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import experts_of
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from fusion_bench_smile import ConfigError, PlanError, load, upscale
from fusion_bench_smile.kin import SmileConv1D
from fusion_bench_smile.layers import Routed, SmileConv2d, SmileLayout, SmileLinear

LAYOUTS = [
    SmileLayout(ranks=(4, 4, 4), gate_ranks=(2, 2, 2), top_k=2, expert_bias=True),
    SmileLayout(ranks=(4, 0, 2), gate_ranks=(2, 0, 3)),
    SmileLayout(ranks=(3, 3), gate_ranks=(2, 2), shared_router=False),
    SmileLayout(ranks=(-1, -1), gate_ranks=(2, 2)),
]


def random_experts(layer: Routed, linear: SmileLinear) -> None:
    """The same random experts in both."""
    with torch.no_grad():
        for name in ("gate", "down", "up", "dense", "expert_bias"):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(torch.randn_like(getattr(layer, name)))
                getattr(linear, name).copy_(getattr(layer, name))
        linear.weight.copy_(layer.matrix(layer.weight))
        linear.bias.copy_(layer.bias)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv1d_is_a_linear_layer_with_its_weight_transposed(layout, execution):
    plain = Conv1D(5, 7).double()
    layer = SmileConv1D.around(plain, replace(layout, execution=execution))
    linear = SmileLinear(7, 5, True, layout, dtype=torch.float64)
    random_experts(layer, linear)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2, "padding_mode": "reflect"}]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_is_a_linear_layer_on_patches(layout, options):
    plain = nn.Conv2d(3, 5, (3, 2), **options).double()
    layer = SmileConv2d.around(plain, layout)
    linear = SmileLinear(3 * 3 * 2, 5, True, layout, dtype=torch.float64)
    random_experts(layer, linear)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    around = {"stride": plain.stride, "dilation": plain.dilation}
    padded = x
    if any(plain.padding):
        mode = "constant" if plain.padding_mode == "zeros" else plain.padding_mode
        padded = F.pad(x, plain._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, plain.kernel_size, **around).mT  # (N, positions, in)
    out = layer(x)
    expected = linear(patches).mT.reshape(out.shape)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), out[0], rtol=1e-12, atol=1e-12)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def resnet() -> nn.Module:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config).eval()


def convnext() -> nn.Module:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=5)
    return ConvNextForImageClassification(config).eval()


MODELS = {
    "gpt-2": (gpt2, lambda: {"input_ids": torch.arange(12).view(2, 6)}, {}),
    "resnet": (resnet, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, {"convolutions": True}),
    "convnext": (convnext, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, {"convolutions": True}),
}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


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
    assert any(isinstance(module, Routed) and not isinstance(module, SmileLinear) for module in model.modules())
    torch.testing.assert_close(logits(model, x), logits(expert, x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(model, x), logits(base, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_save_and_reload(name, tmp_path):
    make, inputs, options = MODELS[name]
    base, x = make(), inputs()
    model = upscale(base, experts_of(base), k=3, gate_k=2, top_k=2, **options)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved").eval(), x), logits(model, x))


def test_convolutions_are_upscaled_only_where_asked_for():
    base = resnet()
    model = upscale(base, experts_of(base), k=3, gate_k=2)
    assert {type(module) for module in model.modules() if isinstance(module, Routed)} == {SmileLinear}
    with pytest.raises(PlanError, match="convolutions=true"):
        upscale(nn.Sequential(nn.Conv2d(3, 4, 3)), [nn.Sequential(nn.Conv2d(3, 4, 3))], k=1, gate_k=1)
    with pytest.raises(ConfigError, match="convolutions='yes'"):
        upscale(base, experts_of(base), convolutions="yes")


def test_convolutions_in_groups_stay():
    base = convnext()
    model = upscale(base, experts_of(base), k=3, gate_k=2, convolutions=True)
    grouped = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert grouped
    assert not any(isinstance(module, Routed) for module in grouped)
