"""Several processes build one model together."""

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
from fusion_bench_smile.construction import WorkPartition


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_every_item_is_assigned_once_and_the_costs_are_balanced(costs, size):
    assignments = []
    for rank in range(size):
        partition = WorkPartition()
        partition.rank, partition.size = rank, size
        assignments.append(partition.assign(costs))
    assert all(sum(assigned) == 1 for assigned in zip(*assignments, strict=True))
    mean = sum(costs) / size
    for assigned in assignments:
        assert sum(cost for cost, here in zip(costs, assigned, strict=True) if here) <= mean + 2 * max(costs)
        assert [here for i, here in enumerate(assigned) if i == 0 or here != assigned[i - 1]].count(True) <= 1


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
        upscaled = upscale(
            model, experts, share_work=True, on_progress=lambda done, total: calls.append(total), **options
        )
        torch.save((upscaled.state_dict(), calls), f"{folder}/{rank}.pt")
    except PlanError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


OPTIONS: list[dict] = [{"k": 4, "gate_k": 2}, {"k": -1, "gate_k": 2, "average_experts": True}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["low rank", "dense and averaged"])
def test_two_processes_build_the_model_that_one_builds(tmp_path: Path, options: dict):
    mp.spawn(work, (2, str(tmp_path), options, False), nprocs=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = clip_tower()
    expected = upscale(model, experts_of(model), **options).state_dict()
    counts = []
    for rank in range(2):
        state, calls = torch.load(tmp_path / f"{rank}.pt")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert len(calls) == calls[0]
        counts.append(len(calls))
    assert sum(counts) == 36
    assert min(counts) > 9


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_by_all(tmp_path: Path):
    mp.spawn(work, (2, str(tmp_path), OPTIONS[0], True), nprocs=2)
    messages = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert messages[0] == messages[1]
    assert "holds NaN in" in messages[0]
    assert "fc2.weight" in messages[0]


def test_a_single_process_does_all_items():
    for partition in (WorkPartition(), WorkPartition(single_process=False)):
        assert (partition.rank, partition.size) == (0, 1)
        assert partition.assign([1.0, 2.0, 3.0]) == [True] * 3
        assert partition.all_gather("value") == ["value"]
        partition.raise_together(None)
        with pytest.raises(ValueError, match="wrong"):
            partition.raise_together(ValueError("wrong"))
