"""From files to files: the same model, never held whole, and nothing half-made."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, t5, t5_inputs, tied_llama
from safetensors import safe_open

from fusion_bench_smile import ConfigError, PlanError, load, upscale, upscale_to_folder


def llama_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 40, (2, 5))}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize(("make", "inputs"), [(clip_tower, clip_inputs), (t5, t5_inputs), (tied_llama, llama_inputs)])
def test_it_is_the_model_that_memory_gives(tmp_path, make, inputs, shard, average):
    model = make()
    experts = {str(i): expert for i, expert in enumerate(experts_of(model))}
    model.save_pretrained(tmp_path / "base")
    for name, expert in experts.items():
        expert.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in experts}
    options = {"k": 4, "gate_k": 2, "average_experts": average}
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


def test_a_failure_leaves_nothing_and_an_existing_result_stays(tmp_path):
    model = clip_tower()
    good, bad = experts_of(model, 2)
    with torch.no_grad():
        bad.vision_model.encoder.layers[1].mlp.fc2.weight[0, 0] = torch.inf
    for name, saved in {"base": model, "good": good, "bad": bad}.items():
        saved.save_pretrained(tmp_path / name)
    upscale_to_folder(tmp_path / "base", {"good": tmp_path / "good"}, tmp_path / "out", k=4, gate_k=2)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    with pytest.raises(PlanError, match=r"expert 'bad' holds infinity in .*fc2.weight"):
        upscale_to_folder(tmp_path / "base", {"bad": tmp_path / "bad"}, tmp_path / "out", k=4, gate_k=2)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert {f.name for f in tmp_path.iterdir()} == {"base", "good", "bad", "out"}


def test_what_memory_refuses_is_refused(tmp_path):
    model = clip_tower()
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(PlanError, match="no experts"):
        upscale_to_folder(tmp_path / "base", {}, tmp_path / "out", k=4, gate_k=2)
    with pytest.raises(ConfigError, match="k=4096"):
        upscale_to_folder(tmp_path / "base", {"a": tmp_path / "base"}, tmp_path / "out", k=4096, gate_k=2)
    with pytest.raises(PlanError, match="reads tensor by tensor"):
        upscale_to_folder(tmp_path / "base", {"a": lambda: model}, tmp_path / "out", k=4, gate_k=2)
    assert not (tmp_path / "out").exists()
