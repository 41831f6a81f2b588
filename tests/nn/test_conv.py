"""Routed convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import convnext, experts_of, resnet
from layers import LAYOUTS, copy_random_experts
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, upscale
from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.nn import RoutedLayer, SmileConv2d, SmileLinear


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2, "padding_mode": "reflect"}]
)
@pytest.mark.parametrize(("layout", "top_k"), LAYOUTS)
def test_conv2d_is_a_linear_layer_on_patches(layout, top_k, options):
    plain = nn.Conv2d(3, 5, (3, 2), **options).double()
    layer = SmileConv2d.from_layer(plain, layout, SmileConfig(top_k=top_k))
    linear = SmileLinear(3 * 3 * 2, 5, True, layout, SmileConfig(top_k=top_k), dtype=torch.float64)
    copy_random_experts(layer, linear)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    settings = {"stride": plain.stride, "dilation": plain.dilation}
    padded = x
    if any(plain.padding):
        mode = "constant" if plain.padding_mode == "zeros" else plain.padding_mode
        padded = F.pad(x, plain._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, plain.kernel_size, **settings).mT  # (N, positions, in)
    output = layer(x)
    expected = linear(patches).mT.reshape(output.shape)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), output[0], rtol=1e-12, atol=1e-12)


def test_convolutions_are_upscaled_only_where_asked_for():
    base = resnet()
    model = upscale(base, experts_of(base), k=3, gate_k=2)
    assert {type(module) for module in model.modules() if isinstance(module, RoutedLayer)} == {SmileLinear}
    with pytest.raises(PlanError, match="convolutions=true"):
        upscale(nn.Sequential(nn.Conv2d(3, 4, 3)), [nn.Sequential(nn.Conv2d(3, 4, 3))], k=1, gate_k=1)
    with pytest.raises(ConfigError, match="convolutions='yes'"):
        upscale(base, experts_of(base), convolutions="yes")


def test_grouped_convolutions_stay_as_pretrained():
    base = convnext()
    model = upscale(base, experts_of(base), k=3, gate_k=2, convolutions=True)
    grouped = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert grouped
    assert not any(isinstance(module, RoutedLayer) for module in grouped)
