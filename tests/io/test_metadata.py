"""The metadata of upscaled models: one object, in checkpoint format 3 on disk."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import MINIMAL
from conftest import clip_inputs, clip_tower, experts_of, mlp, output, t5, t5_inputs
from torch import nn

from fusion_bench_smile import (
    CheckpointError,
    FactorCache,
    SmileConfig,
    add_expert,
    calibrate,
    load,
    metadata_of,
    remove_expert,
    save,
    upscale,
    upscale_to_folder,
)
from fusion_bench_smile.io import Provenance, SmileMetadata
from fusion_bench_smile.io.metadata import FORMAT_VERSION, describe_model
from fusion_bench_smile.nn import DENSE, ExpertLayout, RoutedLayer, count_parameters, router_of
from fusion_bench_smile.nn.input_router import SCORED_SHARE


def provenance_of(model: nn.Module) -> Provenance:
    return metadata_of(model).provenance


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = clip_tower()
    named = dict(zip(("base", "red", "green"), [base, *experts_of(base, 2)], strict=True))
    for name, model in named.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in named}


def test_the_provenance_of_a_model():
    base = clip_tower()
    red, green = experts_of(base, 2)
    model = upscale(base, {"red": red, "green": green}, gate_k=2, k=4)
    provenance = provenance_of(model)
    assert provenance.parameters == (count_parameters(base), count_parameters(model))
    layer = "vision_model.encoder.layers.1.mlp.fc2"
    for expert, tuned in enumerate((red, green)):
        delta = (tuned.get_submodule(layer).weight - base.get_submodule(layer).weight).double()
        s = torch.linalg.svdvals(delta.detach())
        kept = float(s[:4].square().sum() / s.square().sum())
        assert provenance.energy[layer][expert] == pytest.approx(kept, abs=1e-5)
    routed = {name for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
    assert provenance.energy.keys() == routed


@pytest.mark.parametrize("routing_use_diff", [True, False])
def test_layers_that_no_expert_changed_are_left_out(routing_use_diff):
    base = mlp()
    red, green = experts_of(base, 2)
    for expert in (red, green):
        expert[0].load_state_dict(base[0].state_dict())
    model = upscale(base, {"red": red, "green": green}, gate_k=2, k=4, routing_use_diff=routing_use_diff)
    assert list(provenance_of(model).energy) == ["3"]
    assert provenance_of(model).parameters[1] == count_parameters(model)


def test_the_digest_of_a_source_depends_on_its_weights_alone(folders, tmp_path):
    base, paths = load_base(folders), {name: folders[name] for name in ("red", "green")}
    models = {name: type(base).from_pretrained(path) for name, path in paths.items()}
    expected = provenance_of(upscale(base, models, gate_k=2, k=4)).sources
    assert len(set(expected.values())) == 2
    assert provenance_of(upscale(base, paths, gate_k=2, k=8)).sources == expected
    cache = FactorCache(tmp_path / "cache")
    for _ in range(2):
        assert provenance_of(upscale(base, paths, gate_k=2, k=4, factor_cache=cache)).sources == expected
    upscale_to_folder(folders["base"], paths, tmp_path / "out", gate_k=2, k=4)
    assert provenance_of(load(tmp_path / "out")) == provenance_of(upscale(base, paths, gate_k=2, k=4))
    with torch.no_grad():
        models["red"].vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    changed = provenance_of(upscale(base, models, gate_k=2, k=4)).sources
    assert (changed["red"] != expected["red"], changed["green"] == expected["green"]) == (True, True)


def load_base(folders: dict[str, Path]) -> torch.nn.Module:
    return type(clip_tower()).from_pretrained(folders["base"])


def test_adding_and_removing_experts_keeps_the_provenance():
    base = clip_tower()
    named = dict(zip(("red", "green", "blue"), experts_of(base), strict=True))
    whole = provenance_of(upscale(base, named, gate_k=2, k=4))
    two = upscale(base, {name: named[name] for name in ("red", "green")}, gate_k=2, k=4)
    added = provenance_of(add_expert(two, named["blue"], "blue"))
    assert added.sources == whole.sources
    assert added.parameters == whole.parameters
    for layer, values in whole.energy.items():
        assert added.energy[layer] == pytest.approx(values, abs=2e-6)
    fewer = provenance_of(remove_expert(upscale(base, named, gate_k=2, k=4), "green"))
    assert fewer.sources == {name: whole.sources[name] for name in ("red", "blue")}
    assert {layer: [a, c] for layer, (a, _, c) in whole.energy.items()} == fewer.energy


# -- checkpoint format 3

FULL = SmileMetadata(
    config=SmileConfig(
        gate_k=2, k=4, top_k=2, routing_scope="input", execution="masked", storage="int8",
        target_modules=("*.fc1", "*.fc2"), exclude_modules=("*.0.fc2",), param_ratio=1.5,
    ),
    experts=("red", "green"),
    layouts={
        "0.fc1": ExpertLayout(ranks=(4, 0), gate_ranks=(2, 0), expert_bias=True),
        "1.fc2": ExpertLayout(ranks=(DENSE, 3), gate_ranks=(2, 2)),
    },
    provenance=Provenance(
        {"0.fc1": [0.5, 1.0], "1.fc2": [1.0, 0.25]}, {"red": "ab", "green": "cd"}, (100, 150), {"x": "1"}
    ),
    prototypes=(8, 3),
    scored_rows=16,
    loading="import it",
)  # fmt: skip


def test_json_values_and_back_are_the_identity():
    values = FULL.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert SmileMetadata.from_dict(values) == FULL
    assert SmileMetadata.from_dict(json.loads(json.dumps(values))).to_dict() == values


def test_the_keys_of_format_3():
    values = FULL.to_dict()
    assert FORMAT_VERSION == values["format_version"] == 3
    assert list(values) == ["layers", "experts", "options", "recipe", "router", "format_version", "needs"]
    assert values["layers"]["0.fc1"] == {
        "ranks": [4, 0], "gate_ranks": [2, 0], "top_k": 2, "shared_router": True, "expert_bias": True,
        "execution": "masked", "storage": "int8",
    }  # fmt: skip
    assert values["options"] == json.loads(json.dumps(FULL.config.to_dict()))
    assert values["router"] == {"prototypes": [8, 3], "scored_rows": 16}
    assert values["needs"] == "import it"
    assert values["recipe"] == {
        "energy": FULL.provenance.energy, "sources": FULL.provenance.sources, "parameters": [100, 150],
        "calibrated": 2 * 8 + 8 + (8 + 1) * 3 + 5, "versions": {"x": "1"},
    }  # fmt: skip


def test_defaults_of_what_a_checkpoint_leaves_out():
    metadata = SmileMetadata.from_dict(MINIMAL)
    assert metadata.config == SmileConfig(gate_k=1, k=2)  # without the device of the machine that wrote it
    assert metadata.experts == ("a", "b")
    assert metadata.provenance == Provenance({}, {}, (0, 0), {})
    assert metadata.prototypes is None
    assert metadata.to_dict()["router"] == {}
    assert metadata.to_dict()["recipe"]["calibrated"] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", 2), ("execution", "masked"), ("storage", "int8"), ("storage", "int4"), ("shared_router", False)],
)
def test_a_layer_that_contradicts_the_options_is_refused(key, value, tmp_path):
    values = copy.deepcopy(MINIMAL)
    values["layers"]["0"][key] = value
    with pytest.raises(CheckpointError, match=f"^folder: {key} is {value!r} in 0 and .* in the options") as error:
        SmileMetadata.from_dict(values, "folder")
    assert "\n" not in str(error.value)
    base = clip_tower()
    upscale(base, experts_of(base), gate_k=2, k=4).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    list(config["quantization_config"]["layers"].values())[-1][key] = value
    file.write_text(json.dumps(config))
    for read in (load, type(base).from_pretrained):
        with pytest.raises(CheckpointError, match=f"{key} is {value!r} in vision_model"):
            read(tmp_path / "model")


@pytest.mark.parametrize(("version", "remedy"), [(2, "build the model again"), (4, "upgrade fusion-bench-smile")])
def test_other_formats_are_refused(version, remedy):
    with pytest.raises(CheckpointError, match=f"has format version {version}, this package reads 3: {remedy}"):
        SmileMetadata.from_dict({**MINIMAL, "format_version": version})


# -- checkpoints of earlier versions

OLD_OPTIONS = {
    "routing_score": "dual", "noise_baseline": False, "expert_parameters": "layers", "allocation": "gain",
}  # fmt: skip


@pytest.mark.parametrize("scope", ["token", "two_pass", "global", "sequence"])
def test_removed_options_of_an_older_checkpoint_are_left_out(scope, tmp_path):
    base, inputs = clip_tower(), clip_inputs()
    model = upscale(base, experts_of(base), gate_k=2, k=4, routing_scope="token" if scope == "token" else "input")
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    section = config["quantization_config"]
    section["options"] |= OLD_OPTIONS | {"routing_scope": scope}
    del section["options"]["byte_ratio"]
    for layer in section["layers"].values():
        layer["score"] = "dual"
    section |= {"own": {}, "router": {} if scope == "token" else {"baseline": False, "prototypes": None}}
    file.write_text(json.dumps(config))
    loaded = load(tmp_path / "model").eval()
    assert metadata_of(loaded) == metadata_of(model)
    assert torch.equal(output(loaded, inputs), output(model, inputs))


@pytest.mark.parametrize(
    ("values", "option"),
    [({"own": {"norm": ["weight"]}}, "expert_parameters"), ({"router": {"baseline": True}}, "noise_baseline")],
)
def test_removed_parameters_of_an_older_checkpoint_are_refused(values, option):
    with pytest.raises(CheckpointError, match=f"^folder was saved with {option}, which was removed: build the model"):
        SmileMetadata.from_dict({**MINIMAL, **values}, "folder")


# -- one object


OPTIONS = [{}, {"routing_scope": "input", "top_k": 2}, {"gate_k": None, "storage": "int4"}]


def assert_one_config(model: nn.Module) -> None:
    """Every routed layer and the router have the options of the metadata: the same object."""
    config = metadata_of(model).config
    assert metadata_of(model) is metadata_of(model)
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    assert layers
    assert all(layer.smile_config is config for layer in layers)
    router = router_of(model)
    assert (router is None) == (config.routing_scope == "token")
    assert router is None or router.smile_config is config
    assert router is None or router.experts == metadata_of(model).experts
    assert metadata_of(model).layouts == {
        name: module.layout for name, module in model.named_modules() if isinstance(module, RoutedLayer)
    }  # fmt: skip
    assert metadata_of(model).provenance.parameters[1] == count_parameters(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [clip_tower, t5, mlp])
def test_layers_router_and_metadata_share_one_config(make, options, tmp_path):
    base = make()
    model = upscale(base, experts_of(base), **{"gate_k": 2, "k": 4, **options})
    assert_one_config(model)
    copied = copy.deepcopy(model)
    assert_one_config(copied)
    assert metadata_of(copied) == metadata_of(model)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", base if make is mlp else None)
    assert_one_config(loaded)
    assert_one_config(copy.deepcopy(loaded))
    if make is not mlp:
        assert_one_config(type(base).from_pretrained(tmp_path / "model"))
    larger = add_expert(loaded, experts_of(base, 4)[-1], "more")
    assert_one_config(larger)
    assert_one_config(remove_expert(larger, "0"))
    assert_one_config(loaded)


def test_calibration_keeps_the_config():
    base = clip_tower()
    model = upscale(base, dict(zip("ab", experts_of(base, 2), strict=True)), gate_k=2, k=4, routing_scope="input")
    config = metadata_of(model).config
    calibrate(model, {name: [{"pixel_values": torch.randn(5, 3, 28, 28)}] for name in "ab"})
    assert_one_config(model)
    assert metadata_of(model).config is config
    assert metadata_of(model).prototypes == (2 * 2 * math.ceil(12 * SCORED_SHARE), 8)
    assert metadata_of(model).to_dict()["recipe"]["calibrated"] == count_parameters(router_of(model).prototypes)


def test_a_description_is_the_metadata():
    base = t5()
    model = upscale(base, experts_of(base), gate_k=2, k=4, routing_scope="input")
    output(model, t5_inputs())
    metadata = metadata_of(model)
    assert describe_model(model, metadata.config, metadata.experts, metadata.provenance) == metadata
