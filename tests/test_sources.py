"""Where tensors come from: files, adapters, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, t5, t5_inputs, tied_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from fusion_bench_smile import PlanError, plan_upscaling, upscale
from fusion_bench_smile.sources import AdapterSource, FilesSource, StateSource

OPTIONS = {"k": 4, "gate_k": 2}


def saved(models: list[nn.Module], folder: Path, **kwargs) -> dict[str, Path]:
    for number, model in enumerate(models):
        model.save_pretrained(folder / str(number), **kwargs)
    return {str(number): folder / str(number) for number in range(len(models))}


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [(clip_tower, clip_inputs), (t5, t5_inputs), (tied_llama, lambda: {"input_ids": torch.randint(1, 40, (2, 5))})],
)
def test_files_give_the_model_that_modules_give(tmp_path, make, inputs, shard):
    model = make()
    experts = experts_of(model)
    x = inputs()
    from_files = upscale(model, saved(experts, tmp_path, max_shard_size=shard), **OPTIONS)
    expected = upscale(model, experts, **OPTIONS)
    assert torch.equal(output(from_files, x), output(expected, x))


def test_state_dicts_and_functions_are_experts_too(tmp_path):
    model = clip_tower()
    experts = experts_of(model)
    folders = saved(experts, tmp_path)
    mixed = {"0": experts[0].state_dict(), "1": lambda: experts[1], "2": folders["2"]}
    x = clip_inputs()
    assert torch.equal(output(upscale(model, mixed, **OPTIONS), x), output(upscale(model, experts, **OPTIONS), x))


def test_another_component_in_the_files_is_passed_over(tmp_path):
    config = CLIPConfig(
        text_config={
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        },
        vision_config=clip_tower().config.to_dict(),
        projection_dim=8,
    )
    whole = CLIPModel(config)
    whole.save_pretrained(tmp_path / "whole")
    pretrained = clip_tower()
    source = FilesSource(tmp_path / "whole", like=StateSource(pretrained.state_dict()).shapes())
    assert set(source.shapes()) == set(pretrained.state_dict())
    from_files = upscale(pretrained, {"a": tmp_path / "whole"}, **OPTIONS)
    tower = clip_tower()
    tower.vision_model.load_state_dict(whole.vision_model.state_dict())
    x = clip_inputs()
    assert torch.equal(output(from_files, x), output(upscale(pretrained, {"a": tower}, **OPTIONS), x))


def test_damaged_and_missing_files_are_named(tmp_path):
    model = clip_tower()
    folders = saved(experts_of(model), tmp_path, max_shard_size="8KB")
    shards = sorted(folders["1"].glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    with pytest.raises(PlanError, match=rf"expert '1': .*{shards[1].name} can't be read.*incomplete or corrupt"):
        upscale(model, folders, **OPTIONS)
    shards[1].unlink()
    with pytest.raises(PlanError, match=f"lacks {shards[1].name}"):
        upscale(model, folders, **OPTIONS)
    with pytest.raises(PlanError, match="nowhere does not exist"):
        upscale(model, {"0": tmp_path / "nowhere"}, **OPTIONS)
    with pytest.raises(PlanError, match=r"holds neither model.safetensors"):
        upscale(model, {"0": tmp_path}, **OPTIONS)


def test_an_additional_layer_in_the_files_is_refused(tmp_path):
    model = clip_tower()
    folders = saved(experts_of(model, 1), tmp_path)
    file = folders["0"] / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.encoder.layers.2.mlp.fc1.weight"] = torch.zeros(2, 2)
    save_file(tensors, file)
    with pytest.raises(PlanError, match=r"expert '0' has another architecture.*layers\.2\.mlp"):
        plan_upscaling(model, folders, **OPTIONS)


def test_a_late_experts_fault_is_found_before_any_factor(tmp_path, monkeypatch):
    model = clip_tower()
    experts: list = experts_of(model)
    experts[2] = {**experts[2].state_dict(), "vision_model.post_layernorm.weight": torch.zeros(3)}
    factored = []
    monkeypatch.setattr("fusion_bench_smile.parts.truncated_svd", lambda *a, **k: factored.append(a))
    with pytest.raises(PlanError, match=r"expert '2'.*post_layernorm.weight.*\(3,\)"):
        upscale(model, experts, **OPTIONS)
    assert not factored


# --- PEFT adapters


def adapted(model: nn.Module, folder: Path, seed: int = 0, **settings) -> nn.Module:
    """Save a random adapter for a copy of `model` into `folder`; returns what PEFT merges of it."""
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
def test_adapters_give_what_the_merged_models_give(tmp_path, settings):
    model, x = clip_tower(), clip_inputs()
    merged = {str(i): adapted(model, tmp_path / str(i), i, **settings) for i in range(3)}
    folders = {name: tmp_path / name for name in merged}
    for options in (OPTIONS, {"k": -1, "gate_k": 3}, {"k": 8, "gate_k": 8, "average_experts": True}):
        ours = output(upscale(model, folders, **options), x)
        torch.testing.assert_close(ours, output(upscale(model, merged, **options), x), rtol=1e-4, atol=1e-4)


def test_reading_an_adapters_tensors_merges_them(tmp_path):
    model = clip_tower()
    merged = adapted(model, tmp_path / "a", modules_to_save=["layer_norm2"])
    source = AdapterSource(tmp_path / "a", StateSource(model.state_dict()))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(source.read(name), tensor, rtol=1e-5, atol=1e-6)
        if source.is_base(name):
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
