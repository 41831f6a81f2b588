"""Experts in memory, in files, and as functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, output, tied_llama
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_bench_smile import PlanError, plan_upscaling, upscale
from fusion_bench_smile.io import SafetensorsSource, StateDictSource, lazy_source, open_source, tied_names

OPTIONS = {"k": 4, "gate_k": 2}


def test_state_dicts_and_functions_are_experts_too(tmp_path):
    model = clip_tower()
    experts = experts_of(model)
    experts[2].save_pretrained(tmp_path)
    mixed = {"0": experts[0].state_dict(), "1": lambda: experts[1], "2": tmp_path}
    x = clip_inputs()
    assert torch.equal(output(upscale(model, mixed, **OPTIONS), x), output(upscale(model, experts, **OPTIONS), x))


def test_an_additional_layer_in_the_files_is_refused(tmp_path):
    model = clip_tower()
    experts_of(model, 1)[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.encoder.layers.2.mlp.fc1.weight"] = torch.zeros(2, 2)
    save_file(tensors, file)
    with pytest.raises(PlanError, match=r"expert '0' has another architecture.*layers\.2\.mlp"):
        plan_upscaling(model, {"0": tmp_path}, **OPTIONS)


def test_a_defect_of_the_last_expert_is_found_before_any_factorization(tmp_path, monkeypatch):
    model = clip_tower()
    experts: list = experts_of(model)
    experts[2] = {**experts[2].state_dict(), "vision_model.post_layernorm.weight": torch.zeros(3)}
    factored, progress = [], []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: factored.append(a))
    with pytest.raises(PlanError, match=r"expert '2'.*post_layernorm.weight.*\(3,\)"):
        upscale(model, experts, on_progress=lambda *counts: progress.append(counts), **OPTIONS)
    assert not factored
    assert not progress


def test_what_can_be_opened_without_loading_it(tmp_path):
    model = clip_tower()
    pretrained = StateDictSource(model.state_dict())
    model.save_pretrained(tmp_path)
    assert isinstance(open_source(model, pretrained), StateDictSource)
    assert isinstance(open_source(model.state_dict(), pretrained), StateDictSource)
    assert isinstance(open_source(str(tmp_path), pretrained), SafetensorsSource)
    assert isinstance(open_source(tmp_path / "model.safetensors", pretrained), SafetensorsSource)
    assert open_source(pretrained, pretrained) is pretrained
    assert open_source(lambda: model, pretrained) is None


def test_a_state_dict_is_read_as_it_is():
    state = mlp().state_dict()
    source = StateDictSource(state)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())
    assert not any(source.read(name).requires_grad for name in state)
    assert source.identity("0.weight") is None  # tensors in memory may change
    assert source.low_rank("0.weight") is None
    assert not source.is_pretrained("0.weight")


def test_tied_tensors_know_their_other_names():
    assert tied_names(mlp()) == {}
    assert tied_names(tied_llama()) == {
        "model.embed_tokens.weight": ("lm_head.weight",), "lm_head.weight": ("model.embed_tokens.weight",),
    }  # fmt: skip


def test_a_loader_declares_where_its_expert_lies():
    def folder(task: str) -> Path:
        return Path(task)

    @lazy_source(folder)
    def load_expert(task: str) -> nn.Module:
        return mlp()

    assert load_expert.lazy_source is folder
    assert load_expert.lazy_source("digits") == Path("digits")
    assert isinstance(load_expert("digits"), nn.Module)
