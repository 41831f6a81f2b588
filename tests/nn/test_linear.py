"""Routed linear layers: `torch.nn.Linear` is tested in `test_routed`, here is GPT-2's transposed one."""

from __future__ import annotations

import pytest
import torch
from layers import LAYOUTS, copy_random_experts
from transformers.pytorch_utils import Conv1D

from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.nn import SmileConv1D, SmileLinear


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize(("layout", "top_k"), LAYOUTS)
def test_conv1d_is_a_linear_layer_with_its_weight_transposed(layout, top_k, execution):
    plain = Conv1D(5, 7).double()
    layer = SmileConv1D.from_layer(plain, layout, SmileConfig(top_k=top_k, execution=execution))
    linear = SmileLinear(7, 5, True, layout, SmileConfig(top_k=top_k), dtype=torch.float64)
    copy_random_experts(layer, linear)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-12, atol=1e-12)


def test_the_weight_matrix_of_conv1d_is_a_view():
    plain = Conv1D(5, 7)
    matrix = SmileConv1D.weight_matrix(plain.weight)
    assert matrix.shape == (5, 7)
    assert matrix.data_ptr() == plain.weight.data_ptr()
