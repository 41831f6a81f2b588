"""The first pass of two-pass routing: one pass of the pretrained model serves all two-pass variants of a model.

The variants differ in what they compute from it. A variant's expert weights are those of a model that is built with its
options; tests hold this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fusion_bench_smile.config import RoutingScore
from fusion_bench_smile.construction import BATCH_SIZE, NUM_INPUTS, random_inputs
from fusion_bench_smile.nn import (
    ENERGY_SCORES,
    MIN_ENERGY_SHARE,
    Prototypes,
    RoutedLayer,
    layers_with_router,
    mean_over_tokens,
    project_on_router,
    routing_features,
    routing_weights,
    score_projections,
)
from smile_zoo.images import Split
from studies.routing.alternative_scores import AlternativeScores, Score
from studies.routing.benchmarks import Benchmark
from studies.routing.variants import Variant

AVERAGED_SCORES = tuple(score for score in get_args(RoutingScore) if score not in ENERGY_SCORES)
MIN_DEVIATION = 1e-6


@dataclass
class FirstPass:
    """What the first pass knows about N inputs. L is the number of layers with a router, T that of experts.

    Attributes:
        scores: Name of a score → the mean over the tokens of each input, before any logarithm, (L, N, T).
        features: The features that prototypes are fitted to, (N, D).
    """

    scores: dict[str, Tensor]
    features: Tensor

    def layer_scores(self, score: str) -> Tensor:
        """The scores of each layer as they are combined, logarithms for shares of energy: (L, N, T)."""
        scores = self.scores[score]
        return scores if score in AVERAGED_SCORES else scores.clamp(min=MIN_ENERGY_SHARE).log()

    def combined_scores(self, score: str) -> Tensor:
        """The scores of all layers, combined as the two-pass router does: (N, T)."""
        scores = self.layer_scores(score)
        return scores.mean(dim=0) if score in AVERAGED_SCORES else scores.sum(dim=0)

    def standardised_scores(self, score: str, reference: FirstPass) -> Tensor:
        """The mean over layers of scores that are standardised by those of reference inputs: (N, T)."""
        scores = reference.layer_scores(score)
        deviation = scores.std(dim=1, keepdim=True).clamp(min=MIN_DEVIATION)
        return ((self.layer_scores(score) - scores.mean(dim=1, keepdim=True)) / deviation).mean(dim=0)


class _Recorder:
    """Forward hooks of plain layers, which record scores and features of the inputs of one batch.

    Args:
        num_inputs: B.
        mask: (B, tokens), bool: the tokens that are not padding; None counts all.
    """

    def __init__(self, num_inputs: int, mask: Tensor | None) -> None:
        self.num_inputs, self.mask = num_inputs, mask
        self._scores: dict[str, list[Tensor]] = {}
        self._features: list[Tensor] = []

    def record(
        self, layer: RoutedLayer, alternatives: Mapping[str, Score], _: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        """Record one call of the plain layer that a routed layer replaces."""
        x = args[0]
        projections, features = project_on_router(layer, x), routing_features(layer, x)
        assert projections is not None
        assert features is not None
        for score in get_args(RoutingScore):
            self._add_scores(score, score_projections(layer, x, output, projections, score))
        for name, alternative in alternatives.items():
            self._add_scores(name, alternative(x, output, projections))
        self._features.append(self._mean(features).clamp(min=MIN_ENERGY_SHARE).log().float())

    def first_pass(self) -> FirstPass:
        """The scores and features of the batch."""
        scores = {name: torch.stack(values) for name, values in self._scores.items()}
        return FirstPass(scores, torch.cat(self._features, dim=-1))

    def _add_scores(self, name: str, token_scores: Tensor) -> None:
        self._scores.setdefault(name, []).append(self._mean(token_scores).float())

    def _mean(self, token_values: Tensor) -> Tensor:
        return mean_over_tokens(token_values, self.num_inputs, self.mask)


@torch.no_grad()
def run_first_pass(
    pretrained: nn.Module,
    layers: Mapping[str, RoutedLayer],
    batches: Iterable[Mapping[str, Any]],
    with_alternatives: bool = False,
) -> FirstPass:
    """Run inputs through a plain model, and score them by the routers of an upscaled one.

    Args:
        pretrained: The pretrained model, or another one of its class, in evaluation mode.
        layers: Name → routed layer with a router.
        batches: Keyword arguments of the model.
        with_alternatives: Compute `AlternativeScores` too.
    """
    alternatives = {n: AlternativeScores(layer).scores() if with_alternatives else {} for n, layer in layers.items()}
    parts = []
    for batch in batches:
        mask = batch.get("attention_mask")
        num_inputs = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        recorder = _Recorder(num_inputs, None if mask is None else mask.bool())
        hooks = {name: partial(recorder.record, layer, alternatives[name]) for name, layer in layers.items()}
        _call_with_hooks(pretrained, hooks, batch)
        parts.append(recorder.first_pass())
    scores = {name: torch.cat([part.scores[name] for part in parts], dim=1) for name in parts[0].scores}
    return FirstPass(scores, torch.cat([part.features for part in parts]))


def _call_with_hooks(model: nn.Module, hooks: Mapping[str, Callable[..., None]], batch: Mapping[str, Any]) -> None:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class FirstPasses:
    """The first passes that the two-pass variants of one upscaled model need.

    Attributes:
        test: Of the test inputs of all tasks, in the order of the tasks.
        random: Of random inputs.
        calibration: For each task the features of its training inputs, (n, D).
    """

    test: FirstPass
    random: FirstPass
    calibration: list[Tensor]

    @classmethod
    def run(cls, benchmark: Benchmark, model: nn.Module, with_alternatives: bool = False) -> FirstPasses:
        """Run them for an upscaled model, which is not modified."""
        pretrained, layers = benchmark.pretrained(), layers_with_router(model)
        generator = torch.Generator().manual_seed(0)
        noise = [random_inputs(pretrained, BATCH_SIZE, generator) for _ in range(0, NUM_INPUTS, BATCH_SIZE)]
        training = [[batch for batch, _ in benchmark.batches(task, "train")] for task in benchmark.tasks]
        return cls(
            run_first_pass(pretrained, layers, inputs_of(benchmark, "test"), with_alternatives),
            run_first_pass(pretrained, layers, noise, with_alternatives),
            [run_first_pass(pretrained, layers, batches).features for batches in training],
        )

    def expert_weights(self, variant: Variant) -> Tensor:
        """The weight of each expert for each test input, as a model with the variant's options chooses it: (N, T)."""
        if variant.calibration:
            prototypes = Prototypes.fit([features[: variant.calibration] for features in self.calibration])
            return routing_weights(prototypes.scores(self.test.features), variant.top_k)
        scores = self.test.combined_scores(variant.score)
        if variant.noise_baseline:
            noise = self.random.combined_scores(variant.score)
            scores = (scores - noise.mean(dim=0)) / noise.std(dim=0).clamp(min=MIN_DEVIATION)
        return routing_weights(scores, variant.top_k)


def inputs_of(benchmark: Benchmark, split: Split) -> list[dict[str, Any]]:
    """The inputs of all tasks, in the order of the tasks."""
    return [batch for task in benchmark.tasks for batch, _ in benchmark.batches(task, split)]
