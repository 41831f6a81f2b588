"""Several processes build one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import clip_tower, experts_of
from hypothesis import given
from hypothesis import strategies as st

from fusion_bench_smile import PlanError, upscale
from fusion_bench_smile.sharing import Share


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_every_item_has_one_owner_and_the_costs_are_balanced(costs, size):
    shares = []
    for rank in range(size):
        share = Share()
        share.rank, share.size = rank, size
        shares.append(share.takes(costs))
    assert all(sum(owners) == 1 for owners in zip(*shares, strict=True))
    fair = sum(costs) / size
    for taken in shares:
        assert sum(cost for cost, mine in zip(costs, taken, strict=True) if mine) <= fair + 2 * max(costs)


def work(rank: int, size: int, folder: str, options: dict, broken: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = clip_tower()
    experts: list = experts_of(model)
    if broken:
        with torch.no_grad():
            experts[-1].vision_model.encoder.layers[1].mlp.fc2.weight[0, 0] = torch.nan
    calls: list[int] = []
    try:
        upscaled = upscale(model, experts, share_work=True, on_item=lambda done, total: calls.append(total), **options)
        torch.save((upscaled.state_dict(), calls), f"{folder}/{rank}.pt")
    except PlanError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


OPTIONS: list[dict] = [{"k": 4, "gate_k": 2}, {"k": -1, "gate_k": 2, "average_experts": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=["low rank", "dense and averaged"])
def test_two_processes_make_the_model_that_one_makes(tmp_path: Path, options: dict):
    mp.spawn(work, (2, str(tmp_path), options, False), nprocs=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = clip_tower()
    expected = upscale(model, experts_of(model), **options).state_dict()
    done = []
    for rank in range(2):
        state, calls = torch.load(tmp_path / f"{rank}.pt")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert len(calls) == calls[0]
        done.append(len(calls))
    assert sum(done) == 36
    assert min(done) > 9


def test_what_one_process_refuses_all_refuse(tmp_path: Path):
    mp.spawn(work, (2, str(tmp_path), OPTIONS[0], True), nprocs=2)
    messages = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert messages[0] == messages[1]
    assert "holds NaN in" in messages[0]
    assert "fc2.weight" in messages[0]
