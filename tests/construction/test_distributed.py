"""Several processes build one model together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import in_two_processes
from conftest import clip_tower, experts_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusion_bench_smile import upscale
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


OPTIONS: list[dict] = [{"k": 4, "gate_k": 2}, {"k": -1, "gate_k": 2, "average_experts": True}]
OPTIONS += [{"k": -1, "gate_k": 2, "density": 0.1}]


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    results = []
    for options in OPTIONS:
        torch.manual_seed(0)
        model = clip_tower()
        calls: list[int] = []
        upscaled = upscale(
            model,
            experts_of(model),
            share_work=True,
            on_progress=lambda done, total, calls=calls: calls.append(total),
            **options,
        )
        results.append((upscaled.state_dict(), calls))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_build_the_model_that_one_builds(tmp_path: Path):
    in_two_processes(work, tmp_path)
    torch.set_num_threads(1)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, options in enumerate(OPTIONS):
        torch.manual_seed(0)
        model = clip_tower()
        expected = upscale(model, experts_of(model), **options).state_dict()
        counts = []
        for state, calls in (result[number] for result in results):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
            assert len(calls) == calls[0]
            counts.append(len(calls))
        assert sum(counts) == 36
        assert min(counts) > 9


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def fail(done: int, total: int) -> None:
    raise ZeroDivisionError("here")


def save_models(folder: Path) -> None:
    """A pretrained model, and two experts on each of two machines, of which one differs."""
    torch.manual_seed(0)
    base = clip_tower()
    base.save_pretrained(folder / "base")
    for name, expert in zip(("red", "green", "other"), experts_of(base), strict=True):
        expert.save_pretrained(folder / name)
    shutil.copytree(folder / "red", folder / "copy")


def faults(rank: int, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Situations, and what this process does in them."""
    base = type(clip_tower()).from_pretrained(folder / "base")
    second = rank == 1
    same: dict = {"red": folder / "red", "green": folder / "green"}
    options: dict = {"k": 4, "gate_k": 2, "share_work": True}

    def load_expert(name: str) -> Callable[[], object]:
        return lambda: type(base).from_pretrained(folder / name)

    def call(experts: object = same, model: nn.Module = base, **changed: object) -> Callable[[], object]:
        return lambda: upscale(model, experts, **{**options, **changed})

    changed = deepcopy(base)
    with torch.no_grad():
        changed.vision_model.post_layernorm.weight[0] += 1
    broken = deepcopy(base)
    with torch.no_grad():
        broken.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] = torch.nan
    yield "same", call()
    yield "copies", call({**same, "red": folder / "copy"} if second else same)
    yield "functions", call({"red": load_expert("red"), "green": load_expert("green")})
    yield "files", call({**same, "green": folder / "other"} if second else same)
    yield "loaded", call({"red": load_expert("red"), "green": load_expert("other" if second else "green")})
    yield "modules", call({"a": load_expert("other" if second else "green")()})
    yield "pretrained", call(model=changed if second else base)
    yield "options", call(top_k=2 if second else 1)
    yield "names", call({"red": folder / "red", "blue": folder / "green"} if second else same)
    yield "number", call({"red": folder / "red"} if second else same)
    yield "bad model", call(model=broken if second else base)
    yield "bad option", call(top_k=9 if second else 1)
    yield "missing file", call({**same, "green": folder / "nowhere"} if second else same)
    yield "interrupted", call(on_progress=interrupt if second else None)
    yield "failed", call(on_progress=fail if second else None)
    yield "budget", call(param_ratio=1.001 if second else 1.5)
    yield "same at the end", call()
    yield "missing process", (lambda: None) if second else call()


def meet_faults(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=5)
    )
    outcomes: dict[str, tuple[str, object]] = {}
    for name, attempt in faults(rank, Path(folder)):
        try:
            result = attempt()
            outcomes[name] = ("model", result and result.state_dict())
        except BaseException as error:
            outcomes[name] = (type(error).__name__, str(error))
    torch.save(outcomes, f"{folder}/{rank}.pt")


MESSAGES = {
    "files": "the weights of expert 'green': process 1 has others than process 0",
    "loaded": "the weights of expert 'green': process 1 has others than process 0",
    "modules": "the weights of expert 'a': process 1 has others than process 0",
    "pretrained": "the pretrained model: process 1 has others than process 0",
    "options": "the options: process 1 has others than process 0",
    "names": "the experts' names: process 1 has others than process 0",
    "number": "the experts' names: process 1 has others than process 0",
    "bad model": "the pretrained model holds NaN",
    "bad option": "top_k=9 is more than the 2 experts",
    "missing file": "nowhere does not exist",
    "budget": "the options: process 1 has others than process 0",
}


def test_processes_with_different_inputs_or_errors_end_together(tmp_path: Path):
    save_models(tmp_path)
    in_two_processes(meet_faults, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    base = type(clip_tower()).from_pretrained(tmp_path / "base")
    expected = upscale(base, {"red": tmp_path / "red", "green": tmp_path / "green"}, k=4, gate_k=2).state_dict()
    for name in ("same", "copies", "functions", "same at the end"):
        for kind, state in (first[name], second[name]):
            assert kind == "model", state
            assert all(torch.equal(state[key], expected[key]) for key in expected)
    for name, message in MESSAGES.items():
        for kind, text in (first[name], second[name]):
            assert kind in ("PlanError", "ConfigError"), (name, kind, text)
            assert message in text
            assert "\n" not in text
    assert second["interrupted"][0] == "KeyboardInterrupt"
    assert first["interrupted"] == ("PlanError", "process 1 failed: KeyboardInterrupt")
    assert second["failed"][0] == "ZeroDivisionError"
    assert first["failed"] == ("PlanError", "process 1 failed: ZeroDivisionError: here")
    assert first["missing process"][0] == "_MissingProcessError"
    assert first["missing process"][1].startswith("process 1 has ended or does not answer")


def test_a_single_process_does_all_items():
    for partition in (WorkPartition(), WorkPartition(single_process=False)):
        assert (partition.rank, partition.size) == (0, 1)
        assert partition.assign([1.0, 2.0, 3.0]) == [True] * 3
        assert partition.all_gather("value") == ["value"]
        with pytest.raises(ValueError, match="wrong"), partition:
            raise ValueError("wrong")
