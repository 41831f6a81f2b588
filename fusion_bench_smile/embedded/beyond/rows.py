"""Every variant at every budget, and the models that are no mixture, on test inputs: one row for each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis.cost import parameters_of
from ...storage import bytes_of
from ...store import FactorStore
from .benches import Bench
from .judge import Judge, run
from .models import Experts, Seen, build, parameters_beside, reroute
from .rivals import merged
from .variants import GRID, IN_TWO_PASSES, INT8, MORE, OWN, PAPER, Ranks, Variant

log = logging.getLogger(__name__)

Looked = dict[tuple[int, str], Seen]  # by router rows and how they are stored: ranks make no difference


def of_merged(at: Bench, scaling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The merging methods' models."""
    for name, model in merged(at, scaling):
        yield {"variant": name, "ratio": 1.0, **_alone(at, dict.fromkeys(at.tasks, model))}


def of_variants(at: Bench, paper: list[Ranks], ours: list[Ranks], store: FactorStore) -> Iterator[dict[str, Any]]:
    """The individual models, the pretrained one, and the variants with what each budget bought.

    Args:
        paper: what each budget buys where the paper's routing is used.
        ours: and where another is.
    """
    experts, pretrained = at.experts(), at.pretrained()
    yield {"variant": "individual", "ratio": float(len(experts)), **_alone(at, experts)}
    yield {"variant": "pretrained", "ratio": 1.0, **_alone(at, dict.fromkeys(at.tasks, pretrained))}
    known: dict[tuple[str, int, int], dict[str, Any]] = {}
    looked: Looked = {}
    for of_paper, of_ours in zip(paper, ours, strict=True):
        for variant, model, measure in _variants(at, experts, of_paper, of_ours, store, looked):
            ranks = of_paper if variant.paper else of_ours
            beside = parameters_beside(at, variant, model)
            size, weight = parameters_of(model) + beside, bytes_of(model) + 4 * beside
            key = (variant.name, size, ranks.gate_k)  # with all the ranks there are, a larger budget buys nothing
            known[key] = known.get(key) or measure()
            yield {
                "variant": variant.name, "budget": ranks.ratio, "gate_k": ranks.gate_k,
                "allocation": ranks.allocation, "zero_shot": not variant.inputs,
                "ratio": size / parameters_of(pretrained), "bytes": weight / bytes_of(pretrained), **known[key],
            }  # fmt: skip
            log.info("%s %s %s %s: %.1f", at.chosen, at.seed, ranks.ratio, variant.name, known[key]["average"])


def _variants(
    at: Bench, experts: Experts, of_paper: Ranks, of_ours: Ranks, store: FactorStore, looked: Looked
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
        model = build(at, experts, of_ours, replace(variants[0], top_k=2), store)
        judge = Judge(at, model, "test")
        for variant in variants:
            yield variant, model, partial(_as_decided, judge, variant, of_ours, looked)


def _as_routed(at: Bench, model: nn.Module) -> dict[str, Any]:
    correct, layers = run(at, model, "test")
    shares = " ".join(f"{share:.1f}" for share in layers.values())
    return {**_told(at, correct), "right": sum(layers.values()) / len(layers), "layers": shares}


def _as_decided(judge: Judge, variant: Variant, ranks: Ranks, looked: Looked) -> dict[str, Any]:
    key = (ranks.gate_k, variant.storage)
    if key not in looked:
        looked[key] = Seen.by(judge.at, judge.model)
    seen = looked[key]
    weights = seen.test.decided(variant, seen.neutral, seen.calibration)
    correct, mine, others = judge.correct(weights), weights.argmax(-1) == judge.own, judge.oracle()
    parts = {"right": mine, "if_right": correct[mine], "if_wrong": correct[~mine], "own_if_wrong": others[~mine]}
    shares = {name: 100 * part.float().mean().item() if len(part) else None for name, part in parts.items()}
    oracle = {"oracle": 100 * others.float().mean().item(), "oracle_correct": packed(others)}
    return {**_told(judge.at, correct), **shares, **oracle}


def _alone(at: Bench, models: Experts) -> dict[str, Any]:
    """One model for each task, which isn't routed."""
    return _told(at, torch.cat([at.correct(model, task, "test") for task, model in models.items()]))


def _told(at: Bench, correct: Tensor) -> dict[str, Any]:
    of_tasks = 100 * correct.view(len(at.tasks), -1).float().mean(dim=1)
    each: Mapping[str, float] = dict(zip(at.tasks, of_tasks.tolist(), strict=True))
    return {"average": of_tasks.mean().item(), "correct": packed(correct), **each}


def packed(flags: Tensor) -> str:
    """One bit for each input, eight in two hexadecimal digits."""
    padded = nn.functional.pad(flags.long(), (0, -len(flags) % 8)).view(-1, 8)
    return bytes((padded * 2 ** torch.arange(7, -1, -1)).sum(dim=1).tolist()).hex()
