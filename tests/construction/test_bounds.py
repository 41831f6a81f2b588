"""The cost of LoRA experts is known before they are read: their adapters declare the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_tower, experts_of, perturbed
from peft import LoraConfig, get_peft_model

from fusion_bench_smile import plan_upscaling, upscale
from fusion_bench_smile.construction import estimate_seconds
from fusion_bench_smile.nn import count_parameters

SETTINGS: dict[str, dict] = {
    "plain": {},
    "patterns of ranks": {"rank_pattern": {"fc1": 2, "layers.0.self_attn.q_proj": 5}},
    "biases": {"bias": "lora_only"},
    "norms": {"modules_to_save": ["layer_norm1"]},
}
OPTIONS: dict[str, dict] = {
    "k above the ranks": {"k": 8, "gate_k": 2},
    "k below the ranks": {"k": 2, "gate_k": 1},
    "a larger router": {"k": 2, "gate_k": 6},
}


def save_adapter(folder: Path, modules: list[str], **settings: object) -> Path:
    peft = get_peft_model(clip_tower(), LoraConfig(r=4, target_modules=modules, **settings))
    with torch.no_grad():
        for parameter in peft.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0
    peft.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_plan_of_adapters_is_exact(tmp_path, options, settings):
    base = clip_tower()
    modules = {"a": ["q_proj", "fc1"], "b": ["q_proj", "v_proj"], "c": ["q_proj", "fc1", "fc2"]}
    experts = {name: save_adapter(tmp_path / name, part, **settings) for name, part in modules.items()}
    plan = plan_upscaling(base, experts, **options)
    added = count_parameters(upscale(base, experts, **options)) - count_parameters(base)
    summary = plan.summary()
    assert summary["parameters added"] == f"{added:,}"
    assert summary["parameter ratio"] == f"{1 + added / count_parameters(base):.3f}"
    size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in experts.values())
    assert summary["bytes to read of the experts"] == f"{size / 1e6:.1f} MB"


@pytest.mark.parametrize(
    "options", [{"k": -1, "gate_k": 2}, {"k": 4, "gate_k": 2, "routing_use_diff": False}, {"param_ratio": 1.5}], ids=str
)
def test_what_is_read_as_matrices_is_bounded(tmp_path, options):
    base = clip_tower()
    experts = {name: save_adapter(tmp_path / name, ["q_proj"]) for name in "ab"}
    options = {"k": 4, "gate_k": 2, **options}
    plan = plan_upscaling(base, experts, **options)
    added = count_parameters(upscale(base, experts, **options)) - count_parameters(base)
    assert added <= plan.max_added_parameters
    assert "parameters added, at most" in plan.summary()


def test_adapters_beside_whole_models(tmp_path):
    base = clip_tower()
    experts = {
        "a": save_adapter(tmp_path / "a", ["q_proj"]),
        "b": perturbed(base),
        "c": lambda: perturbed(base, seed=2),
    }
    plan = plan_upscaling(base, experts, k=8, gate_k=2)
    assert plan.max_ranks(plan.layers[0])[1:] == [None, None]
    added = count_parameters(upscale(base, experts, k=8, gate_k=2)) - count_parameters(base)
    assert plan.summary()["parameters added, at most"] == f"{added:,}"


def test_factors_take_the_time_of_factors(tmp_path):
    base, calls = clip_tower(), []
    experts = {"a": save_adapter(tmp_path / "a", ["q_proj"]), "b": save_adapter(tmp_path / "b", ["q_proj", "fc1"])}
    plan = plan_upscaling(base, experts, k=8, gate_k=2)
    estimate_seconds(plan, lambda *_: calls.append("matrix"), lambda b, a: calls.append((b.shape, a.shape)), workers=1)
    assert calls == [((32, 4), (4, 32)), ((48, 4), (4, 32))]
    whole = plan_upscaling(base, experts_of(base), k=8, gate_k=2)
    estimate_seconds(whole, lambda *_: calls.append("matrix"), lambda *_: calls.append("pair"), workers=1)
    assert set(calls[2:]) == {"matrix"}
