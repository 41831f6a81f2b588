"""Inputs of a task without an expert: accuracy with and without refusal, one row for each held-out task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fusion_bench_smile import FactorCache
from fusion_bench_smile.nn import Prototypes, routing_weights
from studies.routing.benchmarks import Benchmark
from studies.routing.evaluation import Evaluator
from studies.routing.first_pass import FirstPasses
from studies.routing.models import build_model
from studies.routing.variants import CALIBRATED, RankOptions


def held_out_rows(benchmark: Benchmark, ranks: RankOptions, factor_cache: FactorCache) -> Iterator[dict[str, Any]]:
    """For each task the results of a calibrated model without its expert, in percent."""
    pretrained, num_tasks = benchmark.pretrained(), len(benchmark.tasks)
    model = build_model(benchmark, benchmark.experts(), ranks, CALIBRATED, factor_cache)
    evaluator, first_passes = Evaluator(benchmark, model, "test"), FirstPasses.run(benchmark, model)
    num_features = first_passes.test.features.shape[1]
    for number, held_out in enumerate(benchmark.tasks):
        kept = [index for index in range(num_tasks) if index != number]
        # the features are blocks of T, one for each expert, two blocks for each layer
        columns = torch.tensor([column for column in range(num_features) if column % num_tasks != number])
        prototypes = Prototypes.fit([first_passes.calibration[index][:, columns] for index in kept])
        features, is_held_out = first_passes.test.features[:, columns], evaluator.tasks == number
        weights = torch.zeros(len(features), num_tasks)
        weights[:, kept] = routing_weights(prototypes.scores(features), CALIBRATED.top_k)
        correct, refused = evaluator.correct(weights), ~prototypes.known(features)
        pretrained_correct = benchmark.correct(pretrained, held_out, "test")
        results = {
            "pretrained": pretrained_correct,
            "always an expert": correct[is_held_out],
            "with refusal": torch.where(refused[is_held_out], pretrained_correct, correct[is_held_out]),
            "refused": refused[is_held_out],
            "refused of known tasks": refused[~is_held_out],
        }
        yield {"held out": held_out, **{name: 100 * flags.float().mean().item() for name, flags in results.items()}}
