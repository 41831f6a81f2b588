"""Identification of the expert of an input: router accuracy of scores and of prototypes of other features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusion_bench_smile import FactorCache
from fusion_bench_smile.nn import Prototypes, layers_with_router
from smile_zoo.images import Split
from studies.routing import alternative_scores
from studies.routing.benchmarks import Benchmark
from studies.routing.first_pass import FirstPasses, inputs_of, run_first_pass
from studies.routing.models import build_model, merge_experts
from studies.routing.variants import CALIBRATION_SIZES, TWO_PASS, RankOptions

SCALING = 0.2  # of the sum of all deltas, in the model that replaces the pretrained one in the first pass
PROTOTYPES = f"prototypes of {CALIBRATION_SIZES[-1]} inputs of each task, without the experts' scores, of "
DESCRIPTIONS = {
    **alternative_scores.DESCRIPTIONS,
    "dual, seen by the average": f"`dual`, with W₀ + {SCALING} Σᵢ ΔWᵢ instead of W₀ in the first pass",
    "by layers' energies": f"{PROTOTYPES}the features of calibration",
    "by hidden states": f"{PROTOTYPES}mean and deviation of the tokens of each hidden state",
    "by all experts' hidden states": f"{PROTOTYPES}the same features of the pretrained model and of all experts",
}


def score_rows(benchmark: Benchmark, ranks: RankOptions, factor_cache: FactorCache) -> Iterator[dict[str, Any]]:
    """One row for each score, with the router accuracy of two passes in percent.

    The accuracy of zero-shot scores is measured as they are (``as it is``), standardised by scores of random inputs
    (``against random inputs``), and by scores of all test inputs (``against all test inputs``).
    """
    experts, pretrained = benchmark.experts(), benchmark.pretrained()
    model = build_model(benchmark, experts, ranks, TWO_PASS, factor_cache)
    first_passes = FirstPasses.run(benchmark, model, with_alternatives=True)
    accuracy = partial(_router_accuracy, benchmark)
    for score in first_passes.test.scores:
        scores = {
            "as it is": first_passes.test.combined_scores(score),
            "against random inputs": first_passes.test.standardised_scores(score, first_passes.random),
            "against all test inputs": first_passes.test.standardised_scores(score, first_passes.test),
        }
        yield {"score": score, **{name: accuracy(values) for name, values in scores.items()}}
    merged = merge_experts(benchmark.pretrained(), model, SCALING)
    first_pass = run_first_pass(merged, layers_with_router(model), inputs_of(benchmark, "test"))
    yield {"score": "dual, seen by the average", "as it is": accuracy(first_pass.combined_scores(TWO_PASS.score))}
    scores = {
        "by layers' energies": _prototype_scores(first_passes.calibration, first_passes.test.features),
        "by hidden states": _hidden_state_scores(benchmark, [pretrained]),
        "by all experts' hidden states": _hidden_state_scores(benchmark, [pretrained, *experts.values()]),
    }
    for name, values in scores.items():
        yield {"score": name, "as it is": accuracy(values)}


def _router_accuracy(benchmark: Benchmark, scores: Tensor) -> float:
    """In percent, of scores (N, T) of the test inputs."""
    tasks = torch.arange(len(benchmark.tasks)).repeat_interleave(benchmark.counts["test"])
    return 100 * (scores.argmax(-1) == tasks).float().mean().item()


def _prototype_scores(calibration: list[Tensor], features: Tensor) -> Tensor:
    """The negative distances of inputs (N, D) to prototypes of calibration inputs, (n, D) for each task: (N, T)."""
    return -Prototypes.fit(calibration, cross_validate=False).distances(features)


def _hidden_state_scores(benchmark: Benchmark, models: list[nn.Module]) -> Tensor:
    """`_prototype_scores` of the test inputs, in the hidden states of some models: (N, T)."""
    train, test = (_features(benchmark, split, partial(_hidden_states, models)) for split in ("train", "test"))
    return _prototype_scores(train, torch.cat(test))


def _features(benchmark: Benchmark, split: Split, features: Callable[[Mapping[str, Tensor]], Tensor]) -> list[Tensor]:
    """For each task the features of its inputs, (n, D)."""
    return [torch.cat([features(batch) for batch, _ in benchmark.batches(task, split)]) for task in benchmark.tasks]


@torch.no_grad()
def _hidden_states(models: list[nn.Module], batch: Mapping[str, Tensor]) -> Tensor:
    """Mean and deviation of the tokens of each hidden state, without padding: (B, 2 · models · states · D)."""
    features = []
    for model in models:
        states = torch.stack(model(**batch, output_hidden_states=True).hidden_states, dim=1)  # (B, states, tokens, D)
        mask = batch.get("attention_mask", torch.ones(states.shape[0], states.shape[2]))[:, None, :, None]
        mean = (states * mask).sum(2) / mask.sum(2)
        variance = ((states - mean[:, :, None]).square() * mask).sum(2) / mask.sum(2)
        features += [mean.flatten(1), variance.sqrt().flatten(1)]
    return torch.cat(features, dim=1)
