"""The models that are compared, and what the pretrained part of each sees."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...layers import Routed
from ...noise import BATCH, INPUTS, random_inputs
from ...prototypes import Prototypes
from ...scopes import detach
from ...store import FactorStore
from ...upscale import put_router, upscale
from .benches import Bench
from .looks import Looks, look
from .variants import Ranks, Variant

Experts = Mapping[str, nn.Module]


def build(at: Bench, experts: Experts, ranks: Ranks, variant: Variant, store: FactorStore | None) -> nn.Module:
    """A model with the ranks of a budget, routed in one way, as far as its options say."""
    return upscale(at.pretrained(), dict(experts), ranks.config(at.chosen, variant), store=store).eval()


def reroute(model: nn.Module, at: Bench, ranks: Ranks, variant: Variant) -> None:
    """Route a model that holds the same experts in another way: `build` would put them together again."""
    detach(model)
    for layer in model.modules():
        if isinstance(layer, Routed):
            layer.layout = replace(layer.layout, score=variant.score, top_k=variant.top_k)
    put_router(model, ranks.config(at.chosen, variant), len(at.tasks))


def bare(model: nn.Module) -> nn.Module:
    """The model's layers in a model of their own, to be looked through: what `model` has beside them stays there."""
    copied = deepcopy(model)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    detach(copied)
    return copied


def parameters_beside(at: Bench, variant: Variant, model: nn.Module) -> int:
    """Parameters that a variant needs and the model that stands for it doesn't have."""
    tasks = len(at.tasks)
    if variant.inputs:
        layers = sum(isinstance(m, Routed) and m.gate is not None for m in model.modules())
        return Prototypes.parameters_for(tasks, layers, variant.inputs)
    return 2 * tasks if variant.noise else 0


@dataclass(frozen=True)
class Seen:
    """What the pretrained part of one model sees.

    Attributes:
        test: the test inputs of all tasks, in their order.
        neutral: random inputs.
        calibration: of each task, the features of training inputs, (n, D).
    """

    test: Looks
    neutral: Looks
    calibration: list[Tensor]

    @classmethod
    def by(cls, at: Bench, model: nn.Module, with_ideas: bool = False) -> Seen:
        """Look through `model`, which is left as it is."""
        alone, tasks = bare(model), len(at.tasks)
        test = [batch for task in at.tasks for batch, _ in at.batches(task, "test")]
        generator = torch.Generator().manual_seed(0)
        random = [random_inputs(alone, BATCH, generator) for _ in range(0, INPUTS, BATCH)]
        training = [[batch for batch, _ in at.batches(task, "train")] for task in at.tasks]
        return cls(
            look(alone, test, tasks, with_ideas),
            look(alone, random, tasks, with_ideas),
            [look(alone, batches, tasks).features for batches in training],
        )
