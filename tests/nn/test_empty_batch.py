"""A batch without inputs: an upscaled model returns what the plain one returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import convnext, experts_of, mlp, output
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusion_bench_smile import upscale

EXECUTIONS = [(scope, name) for scope in ("token", "input") for name in ("auto", "grouped", "masked")]


def conv1d() -> nn.Module:
    """The linear layers of GPT-2, whose attention takes no empty batch."""
    return nn.Sequential(Conv1D(32, 20), nn.GELU(), Conv1D(12, 32)).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (mlp, "input", (20,)),
    "linear with tokens": (mlp, "input", (5, 20)),
    "conv1d": (conv1d, "input", (5, 20)),
    "conv2d": (convnext, "pixel_values", (3, 32, 32)),
}


@pytest.mark.parametrize("k", [4, -1])
@pytest.mark.parametrize(("scope", "execution"), EXECUTIONS)
@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch_has_an_empty_output(case: str, scope: str, execution: str, k: int) -> None:
    make, name, shape = CASES[case]
    base = make()
    options = {"routing_scope": scope, "execution": execution, "convolutions": case == "conv2d"}
    model = upscale(base, experts_of(base), gate_k=2, k=k, **options)
    empty, inputs = {name: torch.randn(0, *shape)}, {name: torch.randn(2, *shape)}
    expected = output(base, empty)
    assert output(model, empty).shape == expected.shape
    assert output(model, empty).dtype == expected.dtype
    assert not torch.equal(output(model, inputs), output(base, inputs)), "the model is not routed"
    assert output(model, empty).shape == expected.shape  # also after a call that chose experts
