"""Model selection on the validation split: rank options of each budget, and scaling factors of merging methods."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fusion_bench_smile import ConfigError, FactorCache
from fusion_bench_smile.config import Allocation
from fusion_bench_smile.nn import routed_layers
from studies.routing.baselines import select_scaling
from studies.routing.benchmarks import Benchmark
from studies.routing.evaluation import evaluate_router
from studies.routing.models import Experts, build_model
from studies.routing.variants import BUDGETS, MAX_RANK, PAPER, ZERO_SHOT, RankOptions, Variant

log = logging.getLogger(__name__)

GATE_RANKS = (32, 16, 8, 4, 2, 1)
NUM_GATE_RANKS = 2  # the largest ones that fit into a budget are candidates


def select_options(benchmark: Benchmark, factor_cache: FactorCache) -> dict[str, Any]:
    """Select the options of all models.

    Returns:
        JSON values: the rank options of each budget for the paper's routing (``paper``) and for two passes (``ours``),
        and the scaling factors of the merging methods (``scaling``).
    """
    experts = benchmark.experts()
    ranks = {
        name: [asdict(select_ranks(benchmark, experts, ratio, variant, factor_cache)) for ratio in BUDGETS]
        for name, variant in (("paper", PAPER), ("ours", ZERO_SHOT))
    }

    def average(model: nn.Module) -> float:
        correct = [benchmark.correct(model, task, "validation") for task in benchmark.tasks]
        return torch.cat(correct).float().mean().item()

    return {**ranks, "scaling": select_scaling(benchmark, average)}


def select_ranks(
    benchmark: Benchmark, experts: Experts, ratio: float, variant: Variant, factor_cache: FactorCache
) -> RankOptions:
    """The gate_k and allocation of a budget with the highest accuracy."""
    accuracies: dict[RankOptions, float] = {}
    evaluated: dict[tuple[tuple[int, ...], ...], Tensor] = {}
    for ranks, model in _candidates(benchmark, experts, ratio, variant, factor_cache):
        layouts = [layer.layout for layer in routed_layers(model).values()]
        # a budget for all ranks gives the same model with every allocation
        key = (layouts[0].gate_ranks, *(layout.ranks for layout in layouts))
        if key not in evaluated:
            evaluated[key] = evaluate_router(benchmark, model, "validation")[0]
        accuracies[ranks] = evaluated[key].float().mean().item()
        log.info("%s, %s: %.1f on the validation split", ranks, variant.name, 100 * accuracies[ranks])
    return max(accuracies, key=lambda ranks: accuracies[ranks])


def _candidates(
    benchmark: Benchmark, experts: Experts, ratio: float, variant: Variant, factor_cache: FactorCache
) -> Iterator[tuple[RankOptions, nn.Module]]:
    """The models of a budget with the largest gate ranks that fit into it."""
    fitting: set[int] = set()
    for gate_k in (gate_k for gate_k in GATE_RANKS if gate_k <= MAX_RANK[benchmark.expert_set]):
        for allocation in get_args(Allocation):
            ranks = RankOptions(ratio, gate_k, allocation)
            try:
                model = build_model(benchmark, experts, ranks, variant, factor_cache)
            except ConfigError:  # the router rows exceed the budget
                break
            fitting.add(gate_k)
            yield ranks, model
        if len(fitting) == NUM_GATE_RANKS:
            return
