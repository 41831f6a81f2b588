"""Test accuracy of every variant at every budget, and of the models that are no mixture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusion_bench_smile import FactorCache
from fusion_bench_smile.nn import count_bytes, count_parameters
from studies.routing.baselines import merged_models
from studies.routing.benchmarks import Benchmark
from studies.routing.evaluation import Evaluator, evaluate_router
from studies.routing.first_pass import FirstPasses
from studies.routing.models import Experts, build_model, change_routing, extra_parameters
from studies.routing.stored_tables import pack_bits
from studies.routing.variants import (
    EXPERT_NORMS,
    EXTENSIONS,
    INT8,
    PAPER,
    SCOPES_AND_SCORES,
    TWO_PASS_BUDGETS,
    RankOptions,
    Variant,
)

log = logging.getLogger(__name__)

Row = dict[str, Any]


def merging_rows(benchmark: Benchmark, scaling: dict[str, float]) -> Iterator[Row]:
    """One row for each merging method.

    Args:
        benchmark: The benchmark.
        scaling: Scaling factors of Task Arithmetic and TIES.
    """
    for name, model in merged_models(benchmark, scaling):
        yield {"variant": name, "ratio": 1.0, **_accuracy(benchmark, dict.fromkeys(benchmark.tasks, model))}


def variant_rows(
    benchmark: Benchmark, paper: list[RankOptions], two_pass: list[RankOptions], factor_cache: FactorCache
) -> Iterator[Row]:
    """One row for the individual models, one for the pretrained model, and one for each budget and variant.

    Args:
        benchmark: The benchmark.
        paper: Rank options of each budget for the paper's routing.
        two_pass: Rank options of each budget for all other variants.
        factor_cache: A cache of factors.
    """
    study = _VariantStudy(benchmark, benchmark.experts(), factor_cache)
    pretrained = benchmark.pretrained()
    yield {"variant": "individual", "ratio": float(len(study.experts)), **_accuracy(benchmark, study.experts)}
    yield {"variant": "pretrained", "ratio": 1.0, **_accuracy(benchmark, dict.fromkeys(benchmark.tasks, pretrained))}
    sizes = count_parameters(pretrained), count_bytes(pretrained)
    results: dict[tuple[str, int, int], Row] = {}
    for paper_ranks, two_pass_ranks in zip(paper, two_pass, strict=True):
        for variant, model, measure in study.models(paper_ranks, two_pass_ranks):
            ranks = paper_ranks if variant.paper_ranks else two_pass_ranks
            extra = extra_parameters(benchmark, variant, model)
            parameters, num_bytes = count_parameters(model) + extra, count_bytes(model) + 4 * extra
            key = (variant.name, parameters, ranks.gate_k)  # budgets above the size of all ranks give the same model
            results[key] = results.get(key) or measure()
            yield {
                "variant": variant.name, "budget": ranks.ratio, "gate_k": ranks.gate_k,
                "allocation": ranks.allocation, "zero_shot": not variant.calibration,
                "ratio": parameters / sizes[0], "bytes": num_bytes / sizes[1], **results[key],
            }  # fmt: skip
            average = results[key]["average"]
            log.info("%s %s %s %s: %.1f", benchmark.expert_set, benchmark.seed, ranks.ratio, variant.name, average)


@dataclass
class _VariantStudy:
    """Builds and measures the models of all variants.

    Attributes:
        benchmark: The benchmark.
        experts: Its experts.
        factor_cache: A cache of factors.
        first_passes: By gate_k and storage, which determine the router rows; the ranks of the experts do not matter.
    """

    benchmark: Benchmark
    experts: Experts
    factor_cache: FactorCache
    first_passes: dict[tuple[int, str], FirstPasses] = field(default_factory=dict)

    def models(
        self, paper_ranks: RankOptions, two_pass_ranks: RankOptions
    ) -> Iterator[tuple[Variant, nn.Module, Callable[[], Row]]]:
        """Variant, model and a function that measures it; the next iteration may modify the model."""
        yield PAPER, (model := self._build(paper_ranks, PAPER)), partial(self._measure_router, model)
        if two_pass_ranks.ratio not in TWO_PASS_BUDGETS:
            model = self._build(two_pass_ranks, SCOPES_AND_SCORES[0])
            for variant in (variant for variant in SCOPES_AND_SCORES if variant.scope != "two_pass"):
                change_routing(model, self.benchmark, two_pass_ranks, variant)
                yield variant, model, partial(self._measure_router, model)
        two_pass = [variant for variant in [*SCOPES_AND_SCORES, *EXTENSIONS] if variant.scope == "two_pass"]
        for variants in (two_pass, EXPERT_NORMS, INT8):  # they differ in norms or in stored factors
            model = self._build(two_pass_ranks, replace(variants[0], top_k=2))
            evaluator = Evaluator(self.benchmark, model, "test")
            for variant in variants:
                yield variant, model, partial(self._measure_two_pass, evaluator, variant, two_pass_ranks)

    def _build(self, ranks: RankOptions, variant: Variant) -> nn.Module:
        return build_model(self.benchmark, self.experts, ranks, variant, self.factor_cache)

    def _measure_router(self, model: nn.Module) -> Row:
        correct, accuracies = evaluate_router(self.benchmark, model, "test")
        layers = " ".join(f"{accuracy:.1f}" for accuracy in accuracies.values())
        router_accuracy = sum(accuracies.values()) / len(accuracies)
        return {**_accuracy_columns(self.benchmark, correct), "right": router_accuracy, "layers": layers}

    def _measure_two_pass(self, evaluator: Evaluator, variant: Variant, ranks: RankOptions) -> Row:
        key = (ranks.gate_k, variant.storage)
        if key not in self.first_passes:
            self.first_passes[key] = FirstPasses.run(self.benchmark, evaluator.model)
        weights = self.first_passes[key].expert_weights(variant)
        correct, oracle = evaluator.correct(weights), evaluator.oracle()
        is_right = weights.argmax(-1) == evaluator.tasks
        parts = {
            "right": is_right, "if_right": correct[is_right], "if_wrong": correct[~is_right],
            "own_if_wrong": oracle[~is_right],
        }  # fmt: skip
        shares = {name: _percent(part) if len(part) else None for name, part in parts.items()}
        columns = {"oracle": _percent(oracle), "oracle_correct": pack_bits(oracle)}
        return {**_accuracy_columns(self.benchmark, correct), **shares, **columns}


def _accuracy(benchmark: Benchmark, models: Experts) -> Row:
    """The columns of one model for each task, without routing."""
    correct = [benchmark.correct(model, task, "test") for task, model in models.items()]
    return _accuracy_columns(benchmark, torch.cat(correct))


def _accuracy_columns(benchmark: Benchmark, correct: Tensor) -> Row:
    """Average and single accuracies in percent, and all flags, from the flags of all inputs (N,)."""
    accuracies = 100 * correct.view(len(benchmark.tasks), -1).float().mean(dim=1)
    by_task = dict(zip(benchmark.tasks, accuracies.tolist(), strict=True))
    return {"average": accuracies.mean().item(), "correct": pack_bits(correct), **by_task}


def _percent(flags: Tensor) -> float:
    return 100 * flags.float().mean().item()
