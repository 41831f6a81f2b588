"""PEFT LoRA adapters as experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, output
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_bench_smile import PlanError, upscale
from fusion_bench_smile.io import AdapterSource, StateDictSource
from fusion_bench_smile.io.adapter_source import load_lora_config

OPTIONS = {"k": 4, "gate_k": 2}


def adapted(model: nn.Module, folder: Path, seed: int = 0, **settings) -> nn.Module:
    """Save a random adapter for `model` into `folder`, and return the model that PEFT merges."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"], **settings})
    base = type(model)(model.config)
    base.load_state_dict(model.state_dict())
    peft = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    return PeftModel.from_pretrained(fresh, folder).merge_and_unload().eval()


SETTINGS: dict[str, dict] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {r"layers.0.self_attn.q_proj": 20}},
    "modules to save": {"modules_to_save": ["layer_norm1"]},
    "all biases": {"bias": "all"},
    "modules to save, and all biases": {"modules_to_save": ["layer_norm1"], "bias": "all"},
    "biases of LoRA's layers": {"bias": "lora_only"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_adapters_give_the_model_that_merged_models_give(tmp_path, settings):
    model, x = clip_tower(), clip_inputs()
    merged = {str(i): adapted(model, tmp_path / str(i), i, **settings) for i in range(3)}
    folders = {name: tmp_path / name for name in merged}
    for options in (OPTIONS, {"k": -1, "gate_k": 3}, {"k": 8, "gate_k": 8, "average_experts": True}):
        result = output(upscale(model, folders, **options), x)
        torch.testing.assert_close(result, output(upscale(model, merged, **options), x), rtol=1e-4, atol=1e-4)


def test_reading_an_adapters_tensors_merges_them(tmp_path):
    model = clip_tower()
    merged = adapted(model, tmp_path / "a", modules_to_save=["layer_norm2"])
    source = AdapterSource(tmp_path / "a", StateDictSource(model.state_dict()))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(source.read(name), tensor, rtol=1e-5, atol=1e-6)
        if source.is_pretrained(name):
            assert torch.equal(tensor, model.state_dict()[name])


def test_layers_without_an_adapter_stay_pretrained(tmp_path):
    model = clip_tower()
    adapted(model, tmp_path / "a")
    upscaled = upscale(model, {"a": tmp_path / "a"}, **OPTIONS)
    kinds = {n: type(m).__name__ for n, m in upscaled.named_modules() if isinstance(m, nn.Linear)}
    assert {n.split(".")[-1] for n, kind in kinds.items() if kind == "SmileLinear"} == {"q_proj", "fc1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA adapter"),
        ({"use_dora": True}, "use_dora=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": 5}, "declares rank 5"),
    ],
)
def test_adapters_that_cannot_be_read_are_refused_by_name(tmp_path, change, message):
    model = clip_tower()
    adapted(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PlanError, match=f"expert 'x': .*{message}"):
        upscale(model, {"x": tmp_path / "a"}, **OPTIONS)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    model = clip_tower()
    adapted(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    wide = {n: t if "lora_B" in n else torch.zeros(4, 64) for n, t in tensors.items()}
    save_file(wide, file)
    with pytest.raises(PlanError, match=r"was made for another model: .*q_proj.weight|fc1.weight"):
        upscale(model, {"x": tmp_path / "a"}, **OPTIONS)
    save_file({n.replace("encoder", "decoder"): t for n, t in tensors.items()}, file)
    with pytest.raises(PlanError, match="has no such tensor"):
        upscale(model, {"x": tmp_path / "a"}, **OPTIONS)
    save_file({n: t for n, t in tensors.items() if "lora_B" not in n}, file)
    with pytest.raises(PlanError, match="no counterpart"):
        upscale(model, {"x": tmp_path / "a"}, **OPTIONS)


def test_nan_in_an_adapter_is_named(tmp_path):
    model = clip_tower()
    adapted(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "fc1.lora_B" in n)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(PlanError, match=r"expert 'x' holds NaN in .*fc1.weight"):
        upscale(model, {"x": tmp_path / "a"}, **OPTIONS)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, SETTINGS["patterns"]])
def test_factors_are_the_deltas_of_the_merged_model(tmp_path, settings):
    model = clip_tower()
    merged = adapted(model, tmp_path / "a", **settings)
    source = AdapterSource(tmp_path / "a", StateDictSource(model.state_dict()))
    assert source.shapes() == StateDictSource(model.state_dict()).shapes()
    for name, tensor in model.state_dict().items():
        factors = source.low_rank(name)
        assert (factors is not None) == name.endswith(("q_proj.weight", "fc1.weight"))
        assert source.is_pretrained(name) == (factors is None)
        assert source.identity(name) is None
        if factors is not None:
            b, a = factors
            assert b.shape[1] == a.shape[0] <= 4
            torch.testing.assert_close(b @ a, merged.state_dict()[name] - tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("{", "is not readable JSON"), ('{"peft_type": "IA3"}', "is a IA3 adapter")],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        load_lora_config(tmp_path)
