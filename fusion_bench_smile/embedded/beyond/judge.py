"""Which inputs a model gets right, when somebody else decides for them, and when its own routers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...layers import Routed
from ...scopes import ROUTER, InputRouter
from .benches import Bench


class Judge:
    """Runs one upscaled model on the inputs of every task; the tasks are the experts, in their order.

    What one expert alone makes of an input is computed once, whichever variants choose it.

    Args:
        model: with ``routing_scope="two_pass"``, and with ``top_k`` above 1, which weights what experts add; what its
            layers hold mustn't change meanwhile.
    """

    def __init__(self, at: Bench, model: nn.Module, split: str) -> None:
        self.at, self.model = at, model
        self.router = cast(InputRouter, model.get_submodule(ROUTER))
        self.batches = [(task, *pair) for task in at.tasks for pair in at.batches(task, split)]
        self.own = torch.cat([torch.full((len(y),), at.tasks.index(t)) for t, _, y in self.batches])
        self._known = torch.zeros(len(self.own), len(at.tasks), dtype=torch.bool)
        self._right = torch.zeros_like(self._known)

    @torch.no_grad()
    def correct(self, weights: Tensor) -> Tensor:
        """Whether each input gets its class with these weights of the experts (N, T): (N,)."""
        alone = bool((weights.amax(dim=-1) == 1).all())
        choice, found, start = weights.argmax(dim=-1), [], 0
        for task, batch, labels in self.batches:
            places = torch.arange(start, start + len(labels))
            start += len(labels)
            new = places if not alone else places[~self._known[places, choice[places]]]
            right = self._run(task, batch, labels, new - places[0], weights[new]) if len(new) else None
            if not alone:
                found.append(cast(Tensor, right))
                continue
            if right is not None:
                self._right[new, choice[new]] = right
                self._known[new, choice[new]] = True
            found.append(self._right[places, choice[places]])
        return torch.cat(found)

    def _run(self, task: str, batch: dict[str, Any], labels: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        self.router.forced = weights
        try:
            logits = self.at.logits(self.model, {key: value[rows] for key, value in batch.items()}, task)
        finally:
            self.router.forced = None
        return logits.argmax(-1) == labels[rows]

    def oracle(self) -> Tensor:
        """The same, where every input gets its own task's expert."""
        return self.correct(torch.eye(len(self.at.tasks))[self.own])


@contextmanager
def first_choices(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Layer → for each call the expert that each token, or each input, has first: whole numbers."""
    seen: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Routed) and m.gate is not None}
    for name, layer in layers.items():
        calls = seen.setdefault(name, [])
        layer.see = lambda _, chosen, __, calls=calls: calls.append(chosen[..., 0])
    try:
        yield seen
    finally:
        for layer in layers.values():
            layer.see = None


@torch.no_grad()
def run(at: Bench, model: nn.Module, split: str) -> tuple[Tensor, dict[str, float]]:
    """Which of the inputs of every task the model gets right as it routes itself: (N,).

    Returns:
        Also each layer's share of right choices, in percent: of inputs, or of tokens but padding; mean over tasks.
    """
    correct: list[Tensor] = []
    shares: dict[str, list[float]] = {}
    for number, task in enumerate(at.tasks):
        of_task: dict[str, list[Tensor]] = {}
        with first_choices(model) as seen:
            for batch, labels in at.batches(task, split):
                correct.append(at.logits(model, batch, task).argmax(-1) == labels)
                mask = batch.get("attention_mask")
                for name, calls in seen.items():
                    chosen = calls.pop()
                    of_tokens = mask is not None and mask.shape == chosen.shape
                    of_task.setdefault(name, []).append((chosen[mask.bool()] if of_tokens else chosen) == number)
        for name, right in of_task.items():
            shares.setdefault(name, []).append(torch.cat([part.flatten() for part in right]).float().mean().item())
    return torch.cat(correct), {name: 100 * sum(values) / len(values) for name, values in shares.items()}
