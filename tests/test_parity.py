"""Parity with the framework's implementation of SMILE: same weights, same options, same outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, experts_of, output, to_dtype
from parity import PINNED_VERSION, require_version, upscale_by_framework
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_smile import upscale
from fusion_bench_smile.nn import ExpertLayout, SmileLinear, count_parameters

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
GRID = [
    # gate_k, k, top_k
    (1, 4, 1),
    (4, 4, 1),
    (8, 4, 2),
    (4, 8, 3),
    (2, 12, 1),
    (4, -1, 1),
    (4, -1, 2),
]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("gate_k", "k", "top_k"), GRID)
@pytest.mark.parametrize("routing_use_diff", [True, False])
def test_same_outputs_as_the_framework(architecture, dtype, gate_k, k, top_k, routing_use_diff):
    make_model, make_inputs = ARCHITECTURES[architecture]
    base = make_model().to(dtype)
    experts = experts_of(base)
    inputs = to_dtype(make_inputs(), dtype)
    options = {"gate_k": gate_k, "k": k, "top_k": top_k, "routing_use_diff": routing_use_diff}
    expected = output(upscale_by_framework(base, experts, **options), inputs)
    result = output(upscale(base, experts, **options), inputs)
    assert relative_error(result, expected) <= TOLERANCE[dtype]
    assert relative_error(output(base, inputs), expected) > 1e-3, "the experts have to change the output"


def test_the_pinned_version_is_the_one_in_the_documentation():
    pinned = re.search(r"^# a tested set of releases: fusion-bench ([\d.]+),", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == PINNED_VERSION
    with pytest.raises(pytest.skip.Exception, match=f"pinned to fusion-bench {PINNED_VERSION}; 0.2.34 may compute"):
        require_version("0.2.34")


def test_one_expert_needs_no_router():
    make_model, make_inputs = ARCHITECTURES["clip"]
    base, inputs = make_model().double(), to_dtype(make_inputs(), torch.float64)
    experts = experts_of(base, count=1)
    expected = upscale_by_framework(base, experts, gate_k=4, k=8, top_k=1)
    model = upscale(base, experts, gate_k=4, k=8)
    assert relative_error(output(model, inputs), output(expected, inputs)) <= 1e-9
    assert count_parameters(model) < count_parameters(expected)


def test_shared_router_saves_parameters_on_vit_b32():
    """ViT-B/32 with eight experts, gate_k=16, k=32: 1.49 times the pretrained parameters, the framework's is 1.615."""
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig())  # ViT-B/32
    pretrained = count_parameters(model)
    layout = ExpertLayout(ranks=(32,) * 8, gate_ranks=(16,) * 8, expert_bias=True)
    added_by_framework = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            added_by_framework += 8 * ((16 + 32) * module.in_features + 32 * module.out_features + module.out_features)
            model.set_submodule(name, SmileLinear(module.in_features, module.out_features, True, layout, device="meta"))
    assert pretrained == 87_456_000
    assert count_parameters(model) / pretrained == pytest.approx(1.49, abs=0.005)
    assert (pretrained + added_by_framework) / pretrained == pytest.approx(1.615, abs=0.005)
