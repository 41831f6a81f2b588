"""Measure one set of experts: every variant at every budget, on test inputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from ...analysis.cost import parameters_of
from ...budget import Allocation
from ...errors import ConfigError
from ...layers import Routed
from ...noise import BATCH, INPUTS, random_inputs
from ...prototypes import Prototypes
from ...report import write_whole
from ...scopes import detach
from ...storage import bytes_of
from ...store import FactorStore
from ...upscale import put_router, upscale
from ..build.seeds import SEEDS
from .benches import Bench, bench
from .judge import Judge, run
from .looks import IDEAS, Looks, look
from .rivals import best_scaling, merged
from .variants import (
    BEST,
    CALIBRATION,
    GRID,
    IN_TWO_PASSES,
    INT8,
    LARGEST_RANK,
    MORE,
    OWN,
    PAPER,
    RATIOS,
    Ranks,
    Variant,
)

log = logging.getLogger(__name__)

GATES = (32, 16, 8, 4, 2, 1)
CANDIDATES = 2  # of the gate ranks that fit a budget, the largest
VALIDATION = {"gentle": 50, "strong": 50, "full": 30, "lora": 30}  # inputs of each task
TEST = {"gentle": 100, "strong": 100, "full": 40, "lora": 40}
Experts = Mapping[str, nn.Module]


def measure(root: Path, chosen: str) -> None:
    """Measure one set of experts; each seed's tables are files below ``root/beyond``. What is there is kept."""
    folder = root / "beyond"
    folder.mkdir(exist_ok=True)
    store = FactorStore(root / "store")
    settings = folder / f"{chosen}-choices.json"
    if not settings.exists():
        write_whole(settings, json.dumps(choices(bench(root, chosen, SEEDS[0]), store), indent=1))
    found = json.loads(settings.read_text())
    paper, ours = ([Ranks(**values) for values in found[name]] for name in ("paper", "ours"))
    tables: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
        "rows": lambda at: _rows(at, paper, ours, store),
        "merged": lambda at: _merged(at, found["scaling"]),
        "ideas": lambda at: _ideas(at, ours[RATIOS.index(1.25)], store),
        "unknown": lambda at: _unknown(at, ours[RATIOS.index(1.5)], store),
    }
    for name, seed in product(tables, SEEDS):
        file = folder / f"{chosen}-{seed}-{name}.csv"
        if not file.exists():
            rows = list(tables[name](bench(root, chosen, seed)))
            write_whole(file, pd.DataFrame(rows).assign(set=chosen, seed=seed).to_csv(index=False))
            log.info("%s", file)


def choices(at: Bench, store: FactorStore) -> dict[str, Any]:
    """On validation inputs: the ranks of each budget, for the paper's routing and for ours, and what merging scales."""
    experts = at.experts()
    of_variants = {"paper": PAPER, "ours": OWN[0]}
    found: dict[str, Any] = {
        name: [asdict(choose(at, experts, ratio, variant, store)) for ratio in RATIOS]
        for name, variant in of_variants.items()
    }
    average = partial(_plain_average, at, "validation", VALIDATION[at.chosen])
    return {**found, "scaling": best_scaling(at, average)}


def choose(at: Bench, experts: Experts, ratio: float, variant: Variant, store: FactorStore) -> Ranks:
    """gate_k and allocation of a budget."""
    found: dict[Ranks, float] = {}
    seen: dict[tuple[tuple[int, ...], ...], Tensor] = {}
    for gate_k in (gate_k for gate_k in GATES if gate_k <= LARGEST_RANK[at.chosen]):
        for allocation in get_args(Allocation):
            ranks = Ranks(ratio, gate_k, allocation)
            try:
                model = build(at, experts, ranks, variant, store)
            except ConfigError:
                break  # this many router rows don't fit
            of_layers = [module.layout for module in model.modules() if isinstance(module, Routed)]
            # with all the ranks there are, the allocation makes no difference
            bought = (of_layers[0].gate_ranks, *(layout.ranks for layout in of_layers))
            if bought not in seen:
                seen[bought] = run(at, model, "validation", VALIDATION[at.chosen])[0]
            found[ranks] = seen[bought].float().mean().item()
            log.info("%s, %s: %.1f on validation inputs", ranks, variant.name, 100 * found[ranks])
        if len({ranks.gate_k for ranks in found}) == CANDIDATES:
            break
    return max(found, key=lambda ranks: found[ranks])


def build(at: Bench, experts: Experts, ranks: Ranks, variant: Variant, store: FactorStore) -> nn.Module:
    """A model with the ranks of a budget, routed in one way, as far as its options say."""
    return upscale(at.pretrained(), dict(experts), ranks.config(at.chosen, variant), store=store).eval()


def _merged(at: Bench, scaling: dict[str, float]) -> Iterator[dict[str, Any]]:
    count = TEST[at.chosen]
    for name, model in merged(at, scaling, count):
        yield {"variant": name, "ratio": 1.0, **_plain(at, dict.fromkeys(at.tasks, model), count)}


def _rows(at: Bench, paper: list[Ranks], ours: list[Ranks], store: FactorStore) -> Iterator[dict[str, Any]]:
    experts, pretrained, count = at.experts(), at.pretrained(), TEST[at.chosen]
    yield {"variant": "individual", "ratio": float(len(experts)), **_plain(at, experts, count)}
    yield {"variant": "pretrained", "ratio": 1.0, **_plain(at, dict.fromkeys(at.tasks, pretrained), count)}
    seen: dict[tuple[str, int, int], dict[str, Any]] = {}
    looked: dict[tuple[int, str], Seen] = {}  # by router rows and how they are stored: ranks make no difference
    for of_paper, of_ours in zip(paper, ours, strict=True):
        for variant, model, made in _variants(at, experts, of_paper, of_ours, store, looked):
            ranks = of_paper if variant.paper else of_ours
            extra = _extra(at, variant, model)
            size, weight = parameters_of(model) + extra, bytes_of(model) + 4 * extra
            key = (variant.name, size, ranks.gate_k)  # with all the ranks there are, a larger budget buys nothing
            seen[key] = seen.get(key) or made()
            yield {
                "variant": variant.name, "budget": ranks.ratio, "gate_k": ranks.gate_k,
                "allocation": ranks.allocation, "zero_shot": not variant.inputs,
                "ratio": size / parameters_of(pretrained), "bytes": weight / bytes_of(pretrained), **seen[key],
            }  # fmt: skip
            log.info("%s %s %s %s: %.1f", at.chosen, at.seed, ranks.ratio, variant.name, seen[key]["average"])


def _extra(at: Bench, variant: Variant, model: nn.Module) -> int:
    """Parameters that a variant needs and the model that stands for it doesn't have."""
    tasks = len(at.tasks)
    if variant.inputs:
        layers = sum(isinstance(m, Routed) and m.gate is not None for m in model.modules())
        return Prototypes.parameters_for(tasks, layers, variant.inputs)
    return 2 * tasks if variant.noise else 0


def _variants(
    at: Bench,
    experts: Experts,
    of_paper: Ranks,
    of_ours: Ranks,
    store: FactorStore,
    looked: dict[tuple[int, str], Seen],
) -> Iterator[tuple[Variant, nn.Module, Any]]:
    """Every variant, its model, which is changed when the next one is asked for, and what measures it."""
    yield PAPER, (model := build(at, experts, of_paper, PAPER, store)), partial(_as_routed, at, model)
    others = [variant for variant in GRID if variant.scope != "two_pass" and of_ours.ratio not in IN_TWO_PASSES]
    model = build(at, experts, of_ours, GRID[0], store)
    for variant in others:
        reroute(model, at, of_ours, variant)
        yield variant, model, partial(_as_routed, at, model)
    of_two_pass = [variant for variant in [*GRID, *MORE] if variant.scope == "two_pass"]
    for variants in (of_two_pass, OWN, INT8):  # what experts own can't be given to another router
        model = build(at, experts, of_ours, variants[0], store)
        judge = Judge(at, model, "test", TEST[at.chosen])
        for variant in variants:
            yield variant, model, partial(_as_decided, judge, variant, of_ours, looked)


def reroute(model: nn.Module, at: Bench, ranks: Ranks, variant: Variant) -> None:
    """Route a model that holds the same experts in another way: `build` would put them together again."""
    detach(model)
    for layer in model.modules():
        if isinstance(layer, Routed):
            layer.layout = replace(layer.layout, score=variant.score, top_k=variant.top_k)
    put_router(model, ranks.config(at.chosen, variant), len(at.tasks))


Seen = tuple[Looks, Looks, list[Tensor]]


def see(at: Bench, model: nn.Module) -> Seen:
    """What the pretrained part of an upscaled model sees of test, random and training inputs."""
    bare, tasks = _bare(model), len(at.tasks)
    test = look(bare, [batch for task in at.tasks for batch, _ in at.batches(task, "test", TEST[at.chosen])], tasks)
    calibration = [
        look(bare, [batch for batch, _ in at.batches(task, "train", CALIBRATION[-1])], tasks).features
        for task in at.tasks
    ]
    return test, _neutral(bare, tasks), calibration


def _bare(model: nn.Module) -> nn.Module:
    """The model's layers in a model of their own, to be looked through: what `model` has beside them stays there."""
    copied = deepcopy(model)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    detach(copied)
    return copied


def _neutral(model: nn.Module, tasks: int, with_ideas: bool = False) -> Looks:
    generator = torch.Generator().manual_seed(0)
    inputs = [random_inputs(model, BATCH, generator) for _ in range(0, INPUTS, BATCH)]
    return look(model, inputs, tasks, with_ideas)


def _as_routed(at: Bench, model: nn.Module) -> dict[str, Any]:
    correct, layers = run(at, model, "test", TEST[at.chosen])
    return {**_told(at, correct), "right": sum(layers.values()) / len(layers), "layers": _text(layers)}


def _as_decided(judge: Judge, variant: Variant, ranks: Ranks, looked: dict[tuple[int, str], Seen]) -> dict[str, Any]:
    key = (ranks.gate_k, variant.storage)
    if key not in looked:
        looked[key] = see(judge.at, judge.model)
    test, neutral, calibration = looked[key]
    weights = test.decided(variant, neutral, calibration)
    correct, mine = judge.correct(weights), weights.argmax(-1) == judge.own
    values = _told(judge.at, correct) | {"right": 100 * mine.float().mean().item()}
    for name, part in {"if_right": correct[mine], "if_wrong": correct[~mine]}.items():
        values[name] = 100 * part.float().mean().item() if len(part) else None
    others = judge.oracle()
    values["own_if_wrong"] = 100 * others[~mine].float().mean().item() if (~mine).any() else None
    return values | {"oracle": 100 * others.float().mean().item(), "oracle_correct": _packed(others)}


def _told(at: Bench, correct: Tensor) -> dict[str, Any]:
    of_tasks = 100 * correct.view(len(at.tasks), -1).float().mean(dim=1)
    each = dict(zip(at.tasks, of_tasks.tolist(), strict=True))
    return {"average": of_tasks.mean().item(), "correct": _packed(correct), **each}


def _packed(flags: Tensor) -> str:
    """One bit for each input, eight in two hexadecimal digits."""
    padded = nn.functional.pad(flags.long(), (0, -len(flags) % 8)).view(-1, 8)
    return bytes((padded * 2 ** torch.arange(7, -1, -1)).sum(dim=1).tolist()).hex()


def _text(layers: Mapping[str, float]) -> str:
    return " ".join(f"{share:.1f}" for share in layers.values())


def _plain(at: Bench, models: Experts, count: int) -> dict[str, Any]:
    return _told(at, torch.cat([at.correct(model, task, "test", count) for task, model in models.items()]))


def _plain_average(at: Bench, split: str, count: int, model: nn.Module) -> float:
    return torch.cat([at.correct(model, task, split, count) for task in at.tasks]).float().mean().item()


def _ideas(at: Bench, ranks: Ranks, store: FactorStore) -> Iterator[dict[str, Any]]:
    """For each kind of score, how many inputs find their expert in two passes, compared in three ways."""
    bare = _bare(build(at, at.experts(), ranks, BEST, store))
    tasks, count = len(at.tasks), TEST[at.chosen]
    test = look(bare, [batch for task in at.tasks for batch, _ in at.batches(task, "test", count)], tasks, True)
    neutral = _neutral(bare, tasks, True)
    own = torch.arange(tasks).repeat_interleave(count)
    for kind in test.scores:
        ways = {
            "as it is": test.total(kind),
            "against random inputs": test.against(kind, neutral),
            "against all test inputs": test.against(kind, test),  # needs them, but no labels
        }
        right = {way: 100 * (scores.argmax(-1) == own).float().mean().item() for way, scores in ways.items()}
        yield {"score": kind, "what": IDEAS.get(kind, "an option"), **right}
    described: dict[str, tuple[Callable[[Any], Tensor], str]] = {
        "by layers' energies": (
            lambda batch: look(bare, [batch], tasks).features,
            "prototypes as calibration has them",
        ),
        "by hidden states": (partial(_states, at.pretrained()), "prototypes of the mean token of each hidden state"),
    }
    for name, (features, what) in described.items():
        prototypes = Prototypes._fitted([_described(at, task, "train", CALIBRATION[-1], features) for task in at.tasks])
        away = prototypes.distances(torch.cat([_described(at, task, "test", count, features) for task in at.tasks]))
        share = 100 * (away.argmin(-1) == own).float().mean().item()
        yield {"score": name, "what": f"{what}, of {CALIBRATION[-1]} inputs of each task, alone", "as it is": share}


@torch.no_grad()
def _states(pretrained: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean token of each hidden state: (B, blocks · D)."""
    states = torch.stack(pretrained(**batch, output_hidden_states=True).hidden_states, dim=1)  # (B, blocks, N, D)
    mask = batch.get("attention_mask", torch.ones(states.shape[0], states.shape[2]))[:, None, :, None]
    return ((states * mask).sum(2) / mask.sum(2)).flatten(1)


def _described(at: Bench, task: str, split: str, count: int, features: Callable[[Any], Tensor]) -> Tensor:
    return torch.cat([features(batch) for batch, _ in at.batches(task, split, count)])


def _unknown(at: Bench, ranks: Ranks, store: FactorStore) -> Iterator[dict[str, Any]]:
    """For each task: a model without its expert, calibrated, and what this task's inputs get."""
    experts, pretrained = at.experts(), at.pretrained()
    known = build(at, experts, ranks, BEST, store)
    judge, (test, _, calibration) = Judge(at, known, "test", TEST[at.chosen]), see(at, known)
    for number, held_out in enumerate(at.tasks):
        kept = [i for i in range(len(at.tasks)) if i != number]
        # features are in two blocks of all experts for each layer, of which the held-out one's are left out
        columns = torch.tensor([c for c in range(test.features.shape[1]) if c % len(at.tasks) != number])
        prototypes = Prototypes.fit([calibration[i][:, columns] for i in kept])
        distances = prototypes.distances(test.features[:, columns])
        refused = distances.amin(dim=-1) > prototypes.radius
        weights = torch.zeros(len(judge.own), len(at.tasks))
        weights[torch.arange(len(judge.own)), torch.tensor(kept)[distances.argmin(dim=-1)]] = 1
        mine = judge.own == number
        correct = judge.correct(weights)
        plain = at.correct(pretrained, held_out, "test", TEST[at.chosen])
        with_refusal = torch.where(refused[mine], plain, correct[mine])
        yield {
            "held out": held_out,
            "pretrained": 100 * plain.float().mean().item(),
            "always an expert": 100 * correct[mine].float().mean().item(),
            "with refusal": 100 * with_refusal.float().mean().item(),
            "refused": 100 * refused[mine].float().mean().item(),
            "refused of known tasks": 100 * refused[~mine].float().mean().item(),
        }
