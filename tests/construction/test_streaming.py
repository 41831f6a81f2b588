"""Upscaling from files to files: the same model, complete or absent."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, t5, t5_inputs, tied_llama
from safetensors import safe_open
from safetensors.torch import load_file

from fusion_bench_smile import ConfigError, PlanError, load, metadata_of, upscale, upscale_to_folder
from fusion_bench_smile.construction.streaming import ShardWriter


def llama_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 40, (2, 5))}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize(("make", "inputs"), [(clip_tower, clip_inputs), (t5, t5_inputs), (tied_llama, llama_inputs)])
def test_the_result_is_that_of_upscaling_in_memory(tmp_path, make, inputs, shard, average):
    model = make()
    experts = {str(i): expert for i, expert in enumerate(experts_of(model))}
    model.save_pretrained(tmp_path / "base")
    for name, expert in experts.items():
        expert.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in experts}
    options = {"k": 4, "gate_k": 2, "average_experts": average}
    if average and make is tied_llama:  # the embedding is averaged with the head, or not at all
        options["exclude_modules"] = ("lm_head",)
    upscale_to_folder(tmp_path / "base", folders, tmp_path / "out", max_shard_bytes=shard, **options)
    x = inputs()
    assert torch.equal(output(load(tmp_path / "out").eval(), x), output(upscale(model, experts, **options), x))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 10**9)
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        stored = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                stored |= dict.fromkeys(tensors.keys(), file.name)
        assert stored == index["weight_map"]


def test_a_failure_leaves_nothing_and_keeps_an_existing_result(tmp_path):
    model = clip_tower()
    good, bad = experts_of(model, 2)
    with torch.no_grad():
        bad.vision_model.encoder.layers[1].mlp.fc2.weight[0, 0] = torch.inf
    for name, each in {"base": model, "good": good, "bad": bad}.items():
        each.save_pretrained(tmp_path / name)
    upscale_to_folder(tmp_path / "base", {"good": tmp_path / "good"}, tmp_path / "out", k=4, gate_k=2)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    with pytest.raises(PlanError, match=r"expert 'bad' holds infinity in .*fc2.weight"):
        upscale_to_folder(tmp_path / "base", {"bad": tmp_path / "bad"}, tmp_path / "out", k=4, gate_k=2)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert {f.name for f in tmp_path.iterdir()} == {"base", "good", "bad", "out"}


def test_arguments_that_cannot_work_are_refused(tmp_path):
    model = clip_tower()
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(PlanError, match="no experts"):
        upscale_to_folder(tmp_path / "base", {}, tmp_path / "out", k=4, gate_k=2)
    with pytest.raises(ConfigError, match="k=4096"):
        upscale_to_folder(tmp_path / "base", {"a": tmp_path / "base"}, tmp_path / "out", k=4096, gate_k=2)
    with pytest.raises(PlanError, match="reads tensor by tensor"):
        upscale_to_folder(tmp_path / "base", {"a": lambda: model}, tmp_path / "out", k=4, gate_k=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"storage": "int8"}, {"storage": "int4"}, {"storage": "int4", "k": -1}, {"k": -1, "density": 0.2}]
)
def test_factors_in_few_bits_and_a_choice_for_whole_inputs(options, tmp_path) -> None:
    base = clip_tower()
    base.save_pretrained(tmp_path / "base")
    for number, expert in enumerate(experts_of(base)):
        expert.save_pretrained(tmp_path / str(number))
    experts = {str(number): tmp_path / str(number) for number in range(3)}
    options = {"k": 8, "gate_k": 4, "routing_scope": "input", **options}
    upscale_to_folder(tmp_path / "base", experts, tmp_path / "out", **options)
    model, loaded, inputs = upscale(base, experts, **options), load(tmp_path / "out").eval(), clip_inputs()
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert metadata_of(loaded) == metadata_of(model)


@pytest.mark.parametrize("budget", ["param_ratio", "byte_ratio"])
def test_a_budget_needs_the_whole_model(budget: str, tmp_path) -> None:
    base = clip_tower()
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=rf"{budget}=1\.5 needs the whole model"):
        upscale_to_folder(tmp_path / "base", {"a": tmp_path / "base"}, tmp_path / "out", k=8, gate_k=1, **{budget: 1.5})
    assert not (tmp_path / "out").exists()


def test_the_metadata_is_that_of_upscaling_in_memory(tmp_path):
    base = t5()
    base.save_pretrained(tmp_path / "base")
    for number, expert in enumerate(experts_of(base)):
        expert.save_pretrained(tmp_path / str(number))
    experts = {str(number): tmp_path / str(number) for number in range(3)}
    upscale_to_folder(tmp_path / "base", experts, tmp_path / "out", k=4, gate_k=2)
    assert metadata_of(load(tmp_path / "out")) == metadata_of(upscale(base, experts, k=4, gate_k=2))


def test_shards_are_bounded_and_the_index_comes_last(tmp_path):
    writer, tensors = ShardWriter(tmp_path, max_bytes=100), {str(i): torch.full((10,), float(i)) for i in range(5)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    writer.finish()
    assert writer.num_files == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 40
    stored = {}
    for file in sorted(tmp_path.glob("model-*-of-00003.safetensors")):
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 100
        assert all(index["weight_map"][name] == file.name for name in part)
        stored |= part
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_the_bound_has_a_separate_file(tmp_path):
    writer = ShardWriter(tmp_path, max_bytes=100)
    for name, size in {"small": 5, "large": 100, "next": 5}.items():
        writer.add(name, torch.zeros(size))
    writer.finish()
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]
