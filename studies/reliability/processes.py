"""Processes: two build one model together, and one of them has other inputs, fails, is interrupted, or never comes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from fusion_bench_smile import PlanError, export_adapters, upscale
from studies.reliability.children import Child, Send
from studies.reliability.models import RANKS, digests, experts_of, identity, upscaled_tower, vision_tower
from studies.reliability.outcomes import Outcome, check, combined, other, outcome_of
from studies.reliability.runner import Case, Part, Trial

PATIENCE = 10.0  # seconds until a group gives a process up
SHORT_PATIENCE = 2.0  # where one never comes
SECONDS = 45.0  # of an attempt, in which every process must end
LONGEST = 0.5  # seconds from the first line of `upscale` to a signal
NUM_PAIRS = 12  # (expert, layer) pairs of each process


@dataclass
class Call:
    """The arguments of one process's call of `upscale`."""

    pretrained: nn.Module
    experts: dict[str, Any]
    options: dict[str, Any] = field(default_factory=lambda: dict(RANKS))
    on_progress: Callable[[int, int], None] | None = None
    error: BaseException | None = None  # that this process raises itself


class Prepared:
    """A pretrained model, and experts in memory, in folders, as adapters, and as functions."""

    def __init__(self, folder: Path) -> None:
        self.base = vision_tower()
        self.experts, self.others = experts_of(self.base), experts_of(self.base, version=1)
        self.folders = {name: folder / name for name in self.experts}
        self.other_folders = {name: folder / f"other-{name}" for name in self.experts}
        for name in self.experts:
            self.experts[name].save_pretrained(self.folders[name])
            self.others[name].save_pretrained(self.other_folders[name])
        self.adapters = export_adapters(upscaled_tower(), folder / "adapters")
        self.other_adapters = export_adapters(upscaled_tower(version=1), folder / "other adapters")

    def sources(self, kind: str, other: bool = False) -> dict[str, Any]:
        """Experts of a kind; the `other` ones have other weights under the same names."""
        models = self.others if other else self.experts
        sources: dict[str, dict[str, Any]] = {
            "modules": dict(models), "functions": {name: partial(copy.deepcopy, m) for name, m in models.items()},
            "folders": dict(self.other_folders if other else self.folders),
            "adapters": dict(self.other_adapters if other else self.adapters),
        }  # fmt: skip
        return sources[kind]


# A scenario gives the call of one process, which is `guilty` or not. Both draw the same random numbers.
Scenario = Callable[[Prepared, Random, bool], Call]
KINDS = ("modules", "functions", "folders", "adapters")


def same_inputs(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """Nothing is wrong. One may have modules where the other one has their files."""
    kinds = random.sample(("modules", "folders"), 2) if random.random() < 0.3 else [random.choice(KINDS)] * 2
    options = random.choice((RANKS, {**RANKS, "param_ratio": 1.6}, {**RANKS, "k": -1}))
    options = RANKS if "adapters" in kinds else options
    return Call(prepared.base, prepared.sources(kinds[guilty]), dict(options))


def other_experts(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """One process has another expert under the same name: other files, weights, or another kind of expert."""
    kind, name = random.choice(KINDS), random.choice([*prepared.experts])
    other = random.choice((prepared.sources(kind, other=True), prepared.sources(random.choice(KINDS), other=True)))
    experts = prepared.sources(kind)
    return Call(prepared.base, {**experts, name: other[name]} if guilty else experts)


def other_pretrained(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """One process has another pretrained model, in a single weight."""
    base = copy.deepcopy(prepared.base)
    parameter = random.choice([*base.parameters()])
    if guilty:
        with torch.no_grad():
            parameter.view(-1)[random.randrange(parameter.numel())] += 0.1
    return Call(base, prepared.sources(random.choice(KINDS)))


def other_options(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """One process has another option, which may be invalid, or a budget that is too small."""
    name, value = random.choice((
        ("k", 3), ("k", 0), ("k", -1), ("gate_k", 1), ("top_k", 2), ("top_k", 3), ("param_ratio", 1.0001),
        ("param_ratio", 1.5), ("routing_scope", "input"), ("storage", "int8"),
        ("average_experts", True), ("target_modules", ["q_proj"]), ("exclude_modules", ["fc1"]), ("unknown", 1),
        ("execution", "grouped"), ("device", "cpu"),
    ))  # fmt: skip
    return Call(prepared.base, prepared.sources(random.choice(KINDS)), {**RANKS, **({name: value} if guilty else {})})


def other_names(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """One process has other names, another order, or another number of experts."""
    experts = prepared.sources(random.choice(KINDS))
    first, second = experts.values()
    changed = random.choice((
        {"second": second, "first": first}, {"first": first}, {"first": first, "other": second},
        {"first": second, "second": first}, {**experts, "third": first}, {"../x": first, "second": second}, {},
    ))  # fmt: skip
    return Call(prepared.base, changed if guilty else experts)


def early_error(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """One process fails before the first exchange."""
    kind = random.choice(("meta", "nan", "class", "empty", "missing folder", "shape"))
    experts, base = prepared.sources(random.choice(KINDS)), cast(nn.Module, prepared.base)
    if guilty and kind == "meta":
        base = copy.deepcopy(base).to(torch.device("meta"))
    elif guilty and kind == "nan":
        base = copy.deepcopy(base)
        next(parameter for name, parameter in base.named_parameters() if "fc1.weight" in name).data[0, 0] = torch.nan
    elif guilty and kind in ("class", "empty"):
        base = nn.Linear(3, 3) if kind == "class" else nn.Module()
    elif guilty:
        experts["first"] = Path("nowhere") if kind == "missing folder" else nn.Linear(3, 3)
    return Call(base, experts)


def late_error(prepared: Prepared, random: Random, guilty: bool) -> Call:
    """One process fails while experts are loaded or factored, or at its last pair."""
    error = random.choice((KeyboardInterrupt(), RuntimeError("of a person"), PlanError("of a person"), SystemExit(3)))
    kind, count = (
        random.choice(("load", "progress", "nan")),
        random.choice((1, random.randint(1, NUM_PAIRS), NUM_PAIRS)),
    )
    experts = prepared.sources("functions" if kind == "load" else random.choice(KINDS))
    name = random.choice([*experts])
    if not guilty:
        return Call(prepared.base, experts)
    if kind == "load":
        return Call(prepared.base, {**experts, name: partial(_raise, error)}, error=error)
    if kind == "nan":
        expert = copy.deepcopy(prepared.experts[name])
        list(expert.parameters())[random.randrange(5, 30)].data.view(-1)[0] = torch.nan
        return Call(prepared.base, {**experts, name: lambda: expert})
    return Call(
        prepared.base, experts, on_progress=lambda done, _: _raise(error) if done >= count else None, error=error
    )


def _raise(error: BaseException) -> Any:
    raise error


# -- attempts


def attempt(prepared: Prepared, case: Case, scenario: Scenario) -> Iterator[Outcome]:
    """Every process ends with one clear error, or all have the model that each builds alone from its inputs."""
    guilty, seed = case.random.choice((0, 1)), case.random.random()
    calls = [scenario(prepared, Random(seed), rank == guilty) for rank in (0, 1)]
    with _pair(case.folder, calls) as children:
        yield judge_results([next(child.values(), None) for child in children])


def signals(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """One process is interrupted or killed at a random time; the other one ends with the model or a clear error."""
    guilty, killed = case.random.choice((0, 1)), case.random.random() < 0.5
    call = same_inputs(prepared, case.random, False)
    with _pair(case.folder, [call, call]) as children:
        time.sleep(case.random.uniform(0, LONGEST))
        children[guilty].kill() if killed else children[guilty].interrupt()
        yield judge_results([next(children[1 - guilty].values(), None)])


def missing(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """One process is in the group but never calls `upscale`; the other one ends with an error that names it."""
    guilty = case.random.choice((0, 1))
    call = Call(prepared.base, prepared.sources(case.random.choice(KINDS)))
    with _pair(case.folder, [None if rank == guilty else call for rank in (0, 1)], SHORT_PATIENCE) as children:
        result = next(children[1 - guilty].values(), None)
        named = check(result is not None and f"process {guilty}" in result[1], f"{result} does not name it")
        yield combined([judge_results([result]), named])


@contextmanager
def _pair(folder: Path, calls: Sequence[Call | None], patience: float = PATIENCE) -> Iterator[list[Child]]:
    """Two processes of one group, each with its call. They live on after it, as notebooks do, until the block ends."""

    def take_part(rank: int, send: Send) -> None:
        rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=patience)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timeout)
        send("in the group")
        if (call := calls[rank]) is not None:
            send(_result(call))
        time.sleep(2 * SECONDS)

    children = [Child(partial(take_part, rank)) for rank in (0, 1)]
    try:
        for child in children:
            next(child.values())
        yield children
    finally:
        for child in children:
            child.end()


def _result(call: Call) -> tuple[str, str, str]:
    """Kind and detail of the outcome of a call, and what identifies the tensors of its model."""
    try:
        model = _build(call, share_work=True)
    except BaseException as error:
        outcome = Outcome("clear error", "its own error") if error is call.error else outcome_of(error)
        return outcome.kind, outcome.detail, ""
    alone = check(identity(model) == identity(_build(call)), "another model than that of its inputs alone")
    return alone.kind, alone.detail, "/".join(digests(model.state_dict()).values())


def _build(call: Call, share_work: bool = False) -> nn.Module:
    progress = call.on_progress if share_work else None
    return upscale(call.pretrained, call.experts, share_work=share_work, on_progress=progress, **call.options)


def judge_results(results: list[Any]) -> Outcome:
    """The outcome of one attempt from the results of some of its processes, None for one without a result."""
    if None in results:
        return other("a process ended without a result")
    outcomes = [Outcome(kind, detail) for kind, detail, _ in results]
    if len({model for *_, model in results}) > 1:  # none for an error
        outcomes.append(other(f"another model, or none, in one of the processes: {[o.detail for o in outcomes]}"))
    return combined(outcomes)


SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "same inputs": (same_inputs, 40), "other experts": (other_experts, 60),
    "other pretrained model": (other_pretrained, 30), "other options": (other_options, 60),
    "other names": (other_names, 30), "error before the first exchange": (early_error, 40),
    "error later": (late_error, 80),
}  # fmt: skip
PART = Part("processes", Prepared, {
    **{name: Trial(partial(attempt, scenario=call), count, SECONDS) for name, (call, count) in SCENARIOS.items()},
    "interrupted or killed": Trial(signals, 80, SECONDS), "never comes": Trial(missing, 10, SECONDS),
})  # fmt: skip
