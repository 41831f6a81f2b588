"""Upscaling models with `torch.nn.MultiheadAttention`, as torchvision's ViT, open_clip and SigLIP have it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import experts_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from fusion_bench_smile import (
    PlanError,
    add_expert,
    load,
    metadata_of,
    remove_expert,
    save,
    upscale,
    upscale_to_folder,
)
from fusion_bench_smile.analysis.task_vectors import layer_deltas, project_onto_zone
from fusion_bench_smile.construction import plan_upscaling
from fusion_bench_smile.io import SafetensorsSource, export_adapters
from fusion_bench_smile.nn import RoutedLayer, SplitMultiheadAttention, routed_layers, split_attention

SIZE, FULL = 16, {"k": 16, "gate_k": 16}
OPTIONS = {"k": 4, "gate_k": 2}
Make = Callable[[], nn.Module]


class EncoderBlock(nn.Module):
    """As in torchvision's `VisionTransformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.self_attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 32), nn.GELU(), nn.Linear(32, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, SIZE, kernel_size=4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, SIZE))
        self.layers = nn.Sequential(EncoderBlock(), EncoderBlock())
        self.head = nn.Linear(SIZE, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.conv_proj(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.head(self.layers(tokens)[:, 0])


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer().eval()


def siglip() -> nn.Module:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=SIZE, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    return SiglipVisionModel(config).eval()


MODELS = pytest.mark.parametrize("make", [vision_transformer, siglip])
ATTENTION = {vision_transformer: "layers.1.self_attention", siglip: "vision_model.head.attention"}


@torch.no_grad()
def output(model: nn.Module, seed: int = 0) -> Tensor:
    result = model(pixel_values=torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return result if isinstance(result, Tensor) else result.pooler_output


def tuned(base: nn.Module, *names: str, seed: int = 1) -> nn.Module:
    """An expert that differs in the layers of the attention, or in those of its parameters that have these names."""
    expert, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if ("attention.in_proj" in name or "attention.out_proj" in name) and (not names or name.endswith(names)):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return expert


@MODELS
@pytest.mark.parametrize("names", [(), ("in_proj_weight",), ("in_proj_bias",), ("attention.out_proj.weight",)])
def test_one_expert_of_full_rank_is_the_expert(make: Make, names):
    base = make()
    expert, before = tuned(base, *names), copy.deepcopy(base.state_dict())
    assert (output(expert) - output(base)).abs().max() > 1e-3  # the change matters
    model = upscale(base, [expert], **FULL)
    torch.testing.assert_close(output(model), output(expert), atol=1e-4, rtol=1e-4)
    routed = {name.rpartition(".")[2] for name in routed_layers(model)}
    assert routed == {layer for layer in ("in_proj", "out_proj") if not names or layer in names[0]}
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@MODELS
@pytest.mark.parametrize("scope", ["token", "input"])
def test_identical_experts_are_the_expert(make: Make, scope):
    base = make()
    expert = tuned(base)
    model = upscale(base, [expert, expert, expert], routing_scope=scope, **FULL)
    torch.testing.assert_close(output(model), output(expert), atol=1e-4, rtol=1e-4)


@MODELS
@pytest.mark.parametrize("storage", ["same", "int4"])
def test_saved_and_reloaded(make: Make, storage: str, tmp_path: Path):
    base = make()
    model = upscale(base, experts_of(base, 3), storage=storage, **OPTIONS)
    assert isinstance(model.get_submodule(ATTENTION[make]).in_proj, RoutedLayer)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", None if make is siglip else base).eval()
    assert torch.equal(output(loaded), output(model))
    assert metadata_of(loaded) == metadata_of(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@MODELS
def test_experts_that_leave_attention_alone_are_saved_too(make: Make, tmp_path: Path):
    base = make()
    expert = copy.deepcopy(base)
    layer = expert.layers[0].mlp[0] if make is vision_transformer else expert.vision_model.head.mlp.fc1
    layer.weight.data += 0.1
    model = upscale(base, [expert], **OPTIONS)
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model", None if make is siglip else base).eval()), output(model))


@MODELS
def test_attention_that_is_left_out_stays_torchs(make: Make, tmp_path: Path):
    base, name = make(), ATTENTION[make]
    options = {**OPTIONS, "exclude_modules": ["*attention.in_proj", "*attention.out_proj"]}
    experts = experts_of(base, 2)
    model = upscale(base, experts, **options)
    assert type(model.get_submodule(name)) is nn.MultiheadAttention
    assert not any(layer.startswith(name) for layer in routed_layers(model))
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model", None if make is siglip else base).eval()), output(model))
    half = upscale(base, experts, **{**options, "exclude_modules": ["*attention.out_proj"]})
    assert isinstance(half.get_submodule(f"{name}.in_proj"), RoutedLayer)
    assert not isinstance(half.get_submodule(f"{name}.out_proj"), RoutedLayer)


@MODELS
def test_in_place(make: Make):
    base, expert = make(), tuned(make())
    expected = output(upscale(base, [expert], **OPTIONS))
    with pytest.raises(PlanError):
        upscale(base, [nn.Linear(2, 2)], in_place=True, **OPTIONS)
    assert type(base.get_submodule(ATTENTION[make])) is nn.MultiheadAttention
    assert upscale(base, [expert], in_place=True, **OPTIONS) is base
    assert isinstance(base.get_submodule(ATTENTION[make]), SplitMultiheadAttention)
    assert torch.equal(output(base), expected)


@MODELS
def test_experts_in_every_form(make: Make, tmp_path: Path):
    base = make()
    expert = tuned(base)
    expected = output(upscale(base, [expert], **OPTIONS))
    if make is siglip:
        expert.save_pretrained(tmp_path / "expert")
    else:
        (tmp_path / "expert").mkdir()
        save_model(expert, str(tmp_path / "expert" / "model.safetensors"))
    forms = (
        expert.state_dict(),
        lambda: expert,
        tmp_path / "expert",
        split_attention(expert),
        SafetensorsSource(tmp_path / "expert"),
    )
    for form in forms:
        assert torch.equal(output(upscale(base, [form], **OPTIONS)), expected)
    assert torch.equal(output(upscale(split_attention(base), [expert], **OPTIONS)), expected)
    plan = plan_upscaling(base, [tmp_path / "expert"], **OPTIONS)
    assert f"{ATTENTION[make]}.in_proj" in {layer.name for layer in plan.layers}
    missing = expert.state_dict()
    del missing[f"{ATTENTION[make]}.in_proj_bias"]
    with pytest.raises(PlanError, match=r"1 tensors missing \(first: .*attention.in_proj.bias\)"):
        plan_upscaling(base, [missing], **OPTIONS)


def test_from_folders_to_a_folder(tmp_path: Path):
    base = siglip()
    experts = experts_of(base, 2)
    for name, each in zip(("base", "0", "1"), (base, *experts), strict=True):
        each.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in ("0", "1")}
    upscale_to_folder(tmp_path / "base", folders, tmp_path / "out", **OPTIONS)
    model, loaded = upscale(base, experts, **OPTIONS), load(tmp_path / "out").eval()
    assert torch.equal(output(loaded), output(model))
    assert metadata_of(loaded) == metadata_of(model)


@MODELS
def test_experts_are_added_and_removed(make: Make):
    base = make()
    named = dict(zip("abc", experts_of(base, 3), strict=True))
    model = upscale(base, named, **OPTIONS)
    two = remove_expert(model, "c")
    expected = upscale(base, {name: named[name] for name in "ab"}, **OPTIONS)
    torch.testing.assert_close(output(two), output(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output(add_expert(two, named["c"], "c")), output(model), atol=1e-5, rtol=1e-5)


@MODELS
def test_task_vectors(make: Make):
    base = make()
    expert, name = tuned(base, "in_proj_weight"), f"{ATTENTION[make]}"
    deltas = {layer.name: layer.experts["e"] for layer in layer_deltas(base, {"e": expert})}
    change = expert.get_parameter(f"{name}.in_proj_weight") - base.get_parameter(f"{name}.in_proj_weight")
    torch.testing.assert_close(deltas[f"{name}.in_proj"], change.detach())
    projected = project_onto_zone(base, expert, "I")
    assert type(projected.get_submodule(name)) is nn.MultiheadAttention
    weights = [model.get_parameter(f"{name}.in_proj_weight") for model in (base, projected, expert)]
    assert not any(torch.equal(weights[1], other) for other in (weights[0], weights[2]))


@MODELS
def test_adapters_of_attention_are_refused(make: Make, tmp_path: Path):
    base, name = make(), ATTENTION[make]
    config = LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "adapter")
    for options in ({}, {"exclude_modules": ["in_proj", "out_proj"]}):
        with pytest.raises(PlanError, match=f"{name} is a torch.nn.MultiheadAttention, .* merge the adapter"):
            upscale(base, [tmp_path / "adapter"], **OPTIONS, **options)
    with pytest.raises(PlanError, match=r"_proj belongs to attention, in which PEFT would ignore it"):
        export_adapters(upscale(base, [tuned(base)], **OPTIONS), tmp_path / "exported")


@MODELS
def test_adapters_with_attention_that_is_stored_whole(make: Make, tmp_path: Path):
    base, options = make(), {"init_lora_weights": False, "modules_to_save": [ATTENTION[make]]}
    config = LoraConfig(r=2, target_modules=r".*mlp\.(0|fc1)", **options)
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = output(adapted.merge_and_unload())
    assert (expected - output(base)).abs().max() > 1e-3
    model = upscale(base, [tmp_path / "adapter"], **FULL)
    torch.testing.assert_close(output(model), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model.get_submodule(ATTENTION[make]).in_proj, RoutedLayer)


def test_unsupported_attention_is_refused():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 4}):
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **options), "out": nn.Linear(8, 8)})
        message = r"MultiheadAttention reads the weight of attention.out_proj .* exclude_modules="
        with pytest.raises(PlanError, match=message):
            upscale(base, [copy.deepcopy(base)], **OPTIONS)
    layer = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16), "out": nn.Linear(8, 8)})
    with pytest.raises(PlanError, match="TransformerEncoderLayer reads the weight"):
        upscale(layer, [copy.deepcopy(layer)], **OPTIONS)


class ReadsInProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.attention.in_proj_weight[:8])


class ReadsOutProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.attention.out_proj.weight)


@pytest.mark.parametrize(("model_type", "layer"), [(ReadsInProjection, "in_proj"), (ReadsOutProjection, "out_proj")])
def test_attention_whose_weights_the_model_reads_is_refused(model_type: type[nn.Module], layer: str):
    base = model_type()
    with pytest.raises(PlanError, match=f"reads the weight of attention.{layer} without calling it"):
        upscale(base, [copy.deepcopy(base)], k=4, gate_k=2)
    model = upscale(base, experts_of(base, 2), k=4, gate_k=2, exclude_modules=["attention.*"])
    assert isinstance(model.out, RoutedLayer)
    assert model(torch.randn(3, 8)).shape == (3, 8)
