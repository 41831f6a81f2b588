"""Training: every parameter that requires a gradient gets one, as `DistributedDataParallel` demands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import in_two_processes
from conftest import clip_tower, experts_of, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusion_bench_smile import load, save, upscale
from fusion_bench_smile.construction.assemble import set_routing
from fusion_bench_smile.io import metadata_of
from fusion_bench_smile.nn import routed_layers

SCOPES = ["token", "input"]
OPTIONS = [
    {"k": 4}, {"k": -1}, {"k": -1, "density": 0.2}, {"k": 4, "routing_use_diff": False},
    {"k": -1, "routing_use_diff": False}, {"k": 4, "routing_use_diff": False, "storage": "int8"},
    {"k": 4, "storage": "int4"},
]  # fmt: skip


def upscaled(**options: object) -> nn.Module:
    torch.manual_seed(0)
    base = mlp().train()
    return upscale(base, experts_of(base), gate_k=2, **options)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_that_require_a_gradient_get_one(options: dict, scope: str, top_k: int) -> None:
    model = upscaled(routing_scope=scope, top_k=top_k, **options)
    model(torch.randn(200, 20)).square().sum().backward()  # enough inputs for all experts
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    weighs = top_k > 1 and scope == "token"
    directions = options["k"] > 0 and options.get("routing_use_diff", True)
    rows = {"int8": "gate_scale"}.get(options.get("storage"), "gate")
    for layer in routed_layers(model).values():
        assert getattr(layer, rows).requires_grad == ((weighs or directions) and options.get("storage") != "int4")


def test_other_options_for_routing_change_what_is_trained() -> None:
    model = upscaled(k=-1, top_k=2)
    layer, metadata = next(iter(routed_layers(model).values())), metadata_of(model)
    assert layer.gate.requires_grad
    set_routing(model, upscaled_config(metadata.config, routing_scope="input"), metadata.experts)
    assert not layer.gate.requires_grad
    set_routing(model, metadata.config, metadata.experts)
    assert layer.gate.requires_grad


def upscaled_config(config, **options: object):
    return type(config)(**{**config.to_dict(), **options})


def test_frozen_models_stay_frozen() -> None:
    base = mlp().requires_grad_(False)
    model = upscale(base, experts_of(base), gate_k=2, k=4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_a_loaded_model_requires_the_same_gradients(options: dict, tmp_path: Path) -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), gate_k=2, **options)
    save(model, tmp_path / "model")
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    loaded = load(tmp_path / "model")
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == expected
    assert not all(expected.values())


def train(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    for options in ({"k": -1}, {"k": 4, "routing_use_diff": False}, {"k": 4, "routing_scope": "input"}):
        train_two_steps(upscaled(**options))
    dist.destroy_process_group()  # a DistributedDataParallel that outlives its group may block


def train_two_steps(model: nn.Module) -> None:
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):  # the second step fails if the first one left out a gradient
        optimizer.zero_grad()
        parallel(torch.randn(100, 20)).square().sum().backward()
        optimizer.step()


@pytest.mark.slow
def test_two_processes_train_two_steps(tmp_path: Path) -> None:
    in_two_processes(train, tmp_path)
