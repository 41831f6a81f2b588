"""The experts of a model as LoRA adapters, and back."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, gpt2, output, t5, t5_inputs, tied_llama
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusion_bench_smile import CheckpointError, PlanError, export_adapters, load, upscale


def linear_experts(base: nn.Module, count: int = 3, bias: bool = True) -> dict[str, nn.Module]:
    """Experts that changed linear layers alone, each a different subset of them."""
    experts = {}
    for number in range(count):
        expert = copy.deepcopy(base)
        layers = [(n, m) for n, m in expert.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and "head" not in n]
        with torch.no_grad():
            for index, (_, module) in enumerate(layers):
                if (index + number) % 4:
                    module.weight += 0.1 * torch.randn_like(module.weight)
                if bias and module.bias is not None:
                    module.bias += 0.1 * torch.randn_like(module.bias)
        experts[f"expert-{number}"] = expert
    return experts


CASES = {
    "clip": (clip_tower, clip_inputs, True),
    "t5": (t5, t5_inputs, False),
    "gpt-2": (gpt2, lambda: {"input_ids": torch.arange(12).view(2, 6)}, True),
    "gpt-2 without biases": (gpt2, lambda: {"input_ids": torch.arange(12).view(2, 6)}, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("gate_k", "k"), [(2, 5), (5, 2), (3, 3)])
def test_an_adapter_is_the_expert(case, gate_k, k, tmp_path):
    make, inputs, bias = CASES[case]
    base, x = make(), inputs()
    experts = linear_experts(base, bias=bias)
    model = upscale(base, experts, k=k, gate_k=gate_k)
    folders = export_adapters(model, tmp_path)
    assert list(folders) == list(experts)
    for name, folder in folders.items():
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        alone = upscale(base, {name: experts[name]}, k=k, gate_k=gate_k)
        torch.testing.assert_close(output(adapted, x), output(alone, x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output(adapted, x), output(base, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", ["clip", "t5"])
def test_a_model_from_the_adapters_is_the_model(case, tmp_path):
    make, inputs, bias = CASES[case]
    base, x = make(), inputs()
    model = upscale(base, linear_experts(base, bias=bias), k=4, gate_k=4)
    again = upscale(base, export_adapters(model, tmp_path), k=4, gate_k=4)
    torch.testing.assert_close(output(again, x), output(model, x), rtol=1e-3, atol=1e-4)


def test_a_reloaded_model_exports_the_same(tmp_path):
    base = clip_tower()
    model = upscale(base, linear_experts(base), k=4, gate_k=2)
    model.save_pretrained(tmp_path / "model")
    first = export_adapters(model, tmp_path / "first")
    second = export_adapters(load(tmp_path / "model"), tmp_path / "second")
    for name, folder in first.items():
        for file in folder.iterdir():
            assert file.read_bytes() == (second[name] / file.name).read_bytes()


def test_models_that_no_adapter_expresses_are_refused(tmp_path):
    base = clip_tower()
    with pytest.raises(PlanError, match=r"vision_model.* has dense experts"):
        export_adapters(upscale(base, experts_of(base), k=-1, gate_k=2), tmp_path / "out")
    with pytest.raises(PlanError, match=r"patch_embedding is a convolution"):
        export_adapters(upscale(base, experts_of(base), k=2, gate_k=2, convolutions=True), tmp_path / "out")
    with pytest.raises(CheckpointError, match="not made by upscale"):
        export_adapters(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_that_changed_nothing_has_no_folder(tmp_path):
    base = clip_tower()
    model = upscale(base, {**linear_experts(base, 1), "same": base}, k=4, gate_k=2)
    assert list(export_adapters(model, tmp_path)) == ["expert-0"]
    assert [file.name for file in tmp_path.iterdir()] == ["expert-0"]


@torch.no_grad()
@pytest.mark.skipif(not hasattr(peft, "create_arrow_model"), reason="this release of PEFT has no Arrow")
@pytest.mark.parametrize("top_k", [1, 2])
def test_arrow_routes_as_smile_with_one_router_row(tmp_path: Path, top_k: int) -> None:
    """Arrow finds the leading direction of an adapter by a power iteration of 15 steps."""
    base = tied_llama().model
    experts = [copy.deepcopy(base) for _ in range(3)]
    for index, expert in enumerate(experts):  # deltas of different ranks with one large singular value
        for name, module in expert.named_modules():
            if isinstance(module, nn.Linear) and not (index == 1 and "down_proj" in name):
                out, in_ = module.weight.shape
                u, v = torch.linalg.qr(torch.randn(out, 3)).Q, torch.linalg.qr(torch.randn(in_, 3)).Q
                module.weight += (u * torch.tensor([1.0, 0.2, 0.1 * (index > 0)])) @ v.mT
    model = upscale(base, experts, gate_k=1, k=3, top_k=top_k)
    folders = export_adapters(model, tmp_path, equal_ranks=True)
    assert list(folders) == ["0", "1", "2"]
    config = peft.ArrowConfig(top_k=top_k, rng_seed=0)
    arrow = peft.create_arrow_model(copy.deepcopy(base), list(map(str, folders.values())), config)
    x = {"input_ids": torch.randint(1, 40, (2, 9))}
    torch.testing.assert_close(output(arrow.eval(), x), output(model, x), rtol=1e-3, atol=1e-3)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), folders["1"]).eval()  # padding changes nothing
    torch.testing.assert_close(output(plain, x), output(experts[1], x), rtol=1e-3, atol=1e-3)


def test_arrow_has_no_biases(tmp_path: Path) -> None:
    base = clip_tower()
    with pytest.raises(PlanError, match="the experts changed biases"):
        export_adapters(upscale(base, experts_of(base), k=4, gate_k=1), tmp_path, equal_ranks=True)
