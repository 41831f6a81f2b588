"""Evaluation of upscaled models, with given weights of the experts or with their routers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusion_bench_smile import use_experts
from fusion_bench_smile.nn import RoutingEvent, layers_with_router, observe_routing
from smile_zoo.images import Split
from studies.routing.benchmarks import Benchmark


class Evaluator:
    """Evaluates one upscaled model on N inputs, with any weights of its T experts.

    The result of a single expert for an input is computed once, and reused for every variant that chooses it.

    Args:
        benchmark: The benchmark; its tasks are the experts.
        model: With ``routing_scope="two_pass"``, and with ``top_k`` above 1, for which the experts' outputs are
            weighted. It must not change while the evaluator is used.
        split: The split of the inputs.

    Attributes:
        tasks: Index of the task of each input, (N,).
    """

    def __init__(self, benchmark: Benchmark, model: nn.Module, split: Split) -> None:
        self.benchmark, self.model = benchmark, model
        self._batches = [(task, *pair) for task in benchmark.tasks for pair in benchmark.batches(task, split)]
        self.tasks = torch.cat(
            [torch.full((len(labels),), benchmark.tasks.index(task)) for task, _, labels in self._batches]
        )
        self._evaluated = torch.zeros(len(self.tasks), len(benchmark.tasks), dtype=torch.bool)
        self._correct = torch.zeros_like(self._evaluated)  # of single experts

    @torch.no_grad()
    def correct(self, weights: Tensor) -> Tensor:
        """Whether each input is classified correctly: (N,), bool.

        Args:
            weights: (N, T)
        """
        is_single = bool((weights.amax(dim=-1) == 1).all())
        results, start = [], 0
        for number, (_, _, labels) in enumerate(self._batches):
            indices = torch.arange(start, start + len(labels))
            start += len(labels)
            evaluate = self._correct_of_single if is_single else self._run
            results.append(evaluate(number, indices, indices - indices[0], weights[indices]))
        return torch.cat(results)

    def oracle(self) -> Tensor:
        """The same with oracle routing: every input is served by the expert of its task."""
        return self.correct(torch.eye(len(self.benchmark.tasks))[self.tasks])

    def _correct_of_single(self, number: int, indices: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """The result of one expert for each input of a batch, from earlier calls where it is known."""
        experts = weights.argmax(dim=-1)
        new = ~self._evaluated[indices, experts]
        if new.any():
            correct = self._run(number, indices[new], rows[new], weights[new])
            self._correct[indices[new], experts[new]] = correct
            self._evaluated[indices[new], experts[new]] = True
        return self._correct[indices, experts]

    def _run(self, number: int, indices: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Run some rows of a batch with weights (rows, T): (rows,), bool."""
        task, batch, labels = self._batches[number]
        with use_experts(self.model, weights):
            logits = self.benchmark.logits(self.model, {key: value[rows] for key, value in batch.items()}, task)
        return logits.argmax(-1) == labels[rows]


@torch.no_grad()
def evaluate_router(benchmark: Benchmark, model: nn.Module, split: Split) -> tuple[Tensor, dict[str, float]]:
    """Evaluate an upscaled model with its router.

    Returns:
        Whether each input of every task is classified correctly, (N,), bool; and layer → router accuracy in percent of
        inputs, or of tokens without padding: the mean over tasks.
    """
    correct: list[Tensor] = []
    accuracies: dict[str, list[float]] = {name: [] for name in layers_with_router(model)}  # in the model's order
    for number, task in enumerate(benchmark.tasks):
        routed: dict[str, list[Tensor]] = {name: [] for name in accuracies}
        for batch, labels in benchmark.batches(task, split):
            logits, experts = _logits_and_experts(benchmark, model, batch, task)
            correct.append(logits.argmax(-1) == labels)
            for name, first in experts.items():
                routed[name].append(_without_padding(first, batch.get("attention_mask")) == number)
        for name, parts in routed.items():
            accuracies[name].append(torch.cat(parts).float().mean().item())
    return torch.cat(correct), {name: 100 * sum(values) / len(values) for name, values in accuracies.items()}


def _logits_and_experts(
    benchmark: Benchmark, model: nn.Module, batch: dict[str, Any], task: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a batch, and layer → the first expert of each token (B, tokens) or of each input (B,)."""
    experts: dict[str, Tensor] = {}

    def record(name: str, event: RoutingEvent) -> None:
        experts[name] = event.experts[..., 0]

    with observe_routing(model, record):
        return benchmark.logits(model, batch, task), experts


def _without_padding(experts: Tensor, mask: Tensor | None) -> Tensor:
    """Experts of tokens (B, tokens) or of inputs (B,), in one dimension."""
    is_of_tokens = mask is not None and mask.shape == experts.shape
    return experts[mask.bool()] if mask is not None and is_of_tokens else experts.flatten()
