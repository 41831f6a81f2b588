"""The framework's own SMILE as the oracle: same weights, same options, same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, experts_of, output, to_dtype
from fusion_bench.method import SmileUpscalingAlgorithm as Framework
from torch import nn

from fusion_bench_smile import upscale

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


def framework(base: nn.Module, experts: list[nn.Module], **options: object) -> nn.Module:
    method = Framework(device="cpu", upscaling_accelerator=None, full_matrices=False, **options)
    return method.merge(copy.deepcopy(base), [copy.deepcopy(e) for e in experts])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


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
    theirs = output(framework(base, experts, **options), inputs)
    ours = output(upscale(base, experts, **options), inputs)
    assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    assert relative_error(output(base, inputs), theirs) > 1e-3, "the experts change nothing: the test shows nothing"


def test_one_expert_needs_no_router():
    make_model, make_inputs = ARCHITECTURES["clip"]
    base, inputs = make_model().double(), to_dtype(make_inputs(), torch.float64)
    experts = experts_of(base, count=1)
    theirs = framework(base, experts, gate_k=4, k=8, top_k=1)
    ours = upscale(base, experts, gate_k=4, k=8)
    assert relative_error(output(ours, inputs), output(theirs, inputs)) <= 1e-9
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in theirs.parameters())


def test_shared_router_saves_parameters_on_vit_b32():
    """ViT-B/32 with eight experts, gate_k=16, k=32: 1.49 times the pretrained parameters, the framework's is 1.615."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from fusion_bench_smile.layers import SmileLayout, SmileLinear

    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig())  # ViT-B/32
    pretrained = sum(p.numel() for p in model.parameters())
    layout = SmileLayout(ranks=(32,) * 8, gate_ranks=(16,) * 8, expert_bias=True)
    theirs = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            theirs += 8 * ((16 + 32) * module.in_features + 32 * module.out_features + module.out_features)
            model.set_submodule(name, SmileLinear(module.in_features, module.out_features, True, layout, device="meta"))
    assert pretrained == 87_456_000
    assert sum(p.numel() for p in model.parameters()) / pretrained == pytest.approx(1.49, abs=0.005)
    assert (pretrained + theirs) / pretrained == pytest.approx(1.615, abs=0.005)
