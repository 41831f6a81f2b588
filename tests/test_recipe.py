"""What a checkpoint tells about how it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_tower, experts_of, mlp
from huggingface_hub import ModelCard

from fusion_bench_smile import FactorStore, add_expert, load, remove_expert, save, upscale, upscale_to_folder
from fusion_bench_smile.checkpoint import section_of
from fusion_bench_smile.layers import Routed
from fusion_bench_smile.recipe import Recipe


def recipe_of(model: torch.nn.Module) -> Recipe:
    return Recipe.from_dict(section_of(model).recipe)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = clip_tower()
    named = dict(zip(("base", "red", "green"), [base, *experts_of(base, 2)], strict=True))
    for name, model in named.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in named}


def test_the_recipe_says_what_the_model_is():
    base = clip_tower()
    red, green = experts_of(base, 2)
    model = upscale(base, {"red": red, "green": green}, gate_k=2, k=4)
    recipe = recipe_of(model)
    sizes = [sum(parameter.numel() for parameter in m.parameters()) for m in (base, model)]
    assert list(recipe.parameters) == sizes
    layer = "vision_model.encoder.layers.1.mlp.fc2"
    for expert, tuned in enumerate((red, green)):
        delta = (tuned.get_submodule(layer).weight - base.get_submodule(layer).weight).double()
        s = torch.linalg.svdvals(delta.detach())
        kept = float(s[:4].square().sum() / s.square().sum())
        assert recipe.energy[layer][expert] == pytest.approx(kept, abs=1e-5)
    assert recipe.energy.keys() == {name for name, module in model.named_modules() if isinstance(module, Routed)}


@pytest.mark.parametrize("routing_use_diff", [True, False])
def test_layers_that_no_expert_changed_count_for_nothing(routing_use_diff):
    base = mlp()
    red, green = experts_of(base, 2)
    for expert in (red, green):
        expert[0].load_state_dict(base[0].state_dict())
    model = upscale(base, {"red": red, "green": green}, gate_k=2, k=4, routing_use_diff=routing_use_diff)
    recipe = recipe_of(model)
    assert list(recipe.energy) == ["3"]
    assert recipe.parameters[1] == sum(parameter.numel() for parameter in model.parameters())


def test_the_hash_of_a_source_is_that_of_its_weights_however_they_are_read(folders, tmp_path):
    base, paths = load_base(folders), {name: folders[name] for name in ("red", "green")}
    models = {name: type(base).from_pretrained(path) for name, path in paths.items()}
    expected = recipe_of(upscale(base, models, gate_k=2, k=4)).sources
    assert len(set(expected.values())) == 2
    assert recipe_of(upscale(base, paths, gate_k=2, k=8)).sources == expected
    store = FactorStore(tmp_path / "store")
    for _ in range(2):
        assert recipe_of(upscale(base, paths, gate_k=2, k=4, store=store)).sources == expected
    upscale_to_folder(folders["base"], paths, tmp_path / "out", gate_k=2, k=4)
    assert recipe_of(load(tmp_path / "out")) == recipe_of(upscale(base, paths, gate_k=2, k=4))
    with torch.no_grad():
        models["red"].vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    changed = recipe_of(upscale(base, models, gate_k=2, k=4)).sources
    assert (changed["red"] != expected["red"], changed["green"] == expected["green"]) == (True, True)


def load_base(folders: dict[str, Path]) -> torch.nn.Module:
    return type(clip_tower()).from_pretrained(folders["base"])


def test_adding_and_removing_experts_keeps_the_record():
    base = clip_tower()
    named = dict(zip(("red", "green", "blue"), experts_of(base), strict=True))
    whole = recipe_of(upscale(base, named, gate_k=2, k=4))
    two = upscale(base, {name: named[name] for name in ("red", "green")}, gate_k=2, k=4)
    added = recipe_of(add_expert(two, named["blue"], "blue"))
    assert added.sources == whole.sources
    assert added.parameters == whole.parameters
    for layer, values in whole.energy.items():
        assert added.energy[layer] == pytest.approx(values, abs=2e-6)
    fewer = recipe_of(remove_expert(upscale(base, named, gate_k=2, k=4), "green"))
    assert fewer.sources == {name: whole.sources[name] for name in ("red", "blue")}
    assert {layer: [a, c] for layer, (a, _, c) in whole.energy.items()} == fewer.energy


def test_the_card(tmp_path):
    base = clip_tower()
    base.config._name_or_path = "openai/clip-vit-base-patch32"
    model = upscale(base, dict(zip(("red", "green"), experts_of(base, 2), strict=True)), gate_k=2, k=4)
    model.save_pretrained(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    recipe = recipe_of(model)
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert {"smile", "fusion-bench"} <= set(card.data.tags)
    for told in (*recipe.sources.values(), f"{recipe.parameters[1]:,}", "| gate_k | 2 |", "import fusion_bench_smile"):
        assert told in card.text
    again = upscale(base, {"red": experts_of(base, 1)[0]}, k=4)
    again.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "experts: 1;" in text
    assert recipe_of(again).sources["red"] in text
    (tmp_path / "model" / "README.md").write_text("my own words")
    again.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "my own words"


def test_the_card_of_a_model_that_is_on_no_hub_names_no_base(tmp_path, folders):
    model = upscale(load_base(folders), {"red": folders["red"]}, k=4)
    model.save_pretrained(tmp_path / "model")
    assert ModelCard.load(tmp_path / "model" / "README.md").data.base_model is None
    base = mlp()
    save(upscale(base, experts_of(base, 2), gate_k=2, k=4), tmp_path / "plain")
    assert "A SMILE model" in (tmp_path / "plain" / "README.md").read_text()
