"""Which scores find the expert of an input, and what prototypes of other features do: one row for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import Routed
from ...prototypes import Prototypes
from ...store import FactorStore
from .benches import Bench
from .looks import IDEAS, look
from .models import Seen, bare, build
from .variants import BEST, Ranks

SCALING = 0.2  # of the sum of all deltas, in a model that looks at the inputs instead of the pretrained one


def of_scores(at: Bench, ranks: Ranks, store: FactorStore) -> Iterator[dict[str, Any]]:
    """For each kind of score, how many inputs find their expert in two passes, compared in three ways."""
    experts = at.experts()
    model = build(at, experts, ranks, BEST, store)
    seen = Seen.by(at, model, with_ideas=True)
    for kind in seen.test.scores:
        ways = {
            "as it is": seen.test.total(kind),
            "against random inputs": seen.test.against(kind, seen.neutral),
            "against all test inputs": seen.test.against(kind, seen.test),  # needs them, but no labels
        }
        yield {"score": kind, "what": IDEAS.get(kind, "an option"), **{way: _right(at, s) for way, s in ways.items()}}
    inputs = [batch for task in at.tasks for batch, _ in at.batches(task, "test")]
    by_average = look(_averaged(model), inputs, len(at.tasks))
    what = f"`dual`, where W₀ + {SCALING} Σᵢ ΔWᵢ looks at the inputs instead of W₀"
    yield {
        "score": "dual, seen by the average",
        "what": what,
        "as it is": _right(at, by_average.total(BEST.score)),
    }
    prototypes = Prototypes._fitted(seen.calibration)
    of_prototypes = f"prototypes of {at.counts['train']} inputs of each task, alone, of "
    energies = -prototypes.distances(seen.test.features)
    yield {
        "score": "by layers' energies",
        "what": of_prototypes + "what calibration looks at",
        "as it is": _right(at, energies),
    }
    pretrained = at.pretrained()
    for name, models in {
        "by hidden states": [pretrained],
        "by all experts' hidden states": [pretrained, *experts.values()],
    }.items():
        near = _nearness(at, partial(_states, models))
        what = of_prototypes + "the mean and the deviation of the tokens of each hidden state"
        yield {"score": name, "what": what, "as it is": _right(at, near)}


def _right(at: Bench, scores: Tensor) -> float:
    """In percent, of scores (N, T) of the test inputs."""
    own = torch.arange(len(at.tasks)).repeat_interleave(at.counts["test"])
    return 100 * (scores.argmax(-1) == own).float().mean().item()


@torch.no_grad()
def _averaged(model: nn.Module) -> nn.Module:
    """A copy whose plain layers have a share of all experts' deltas, and that is routed as `model` is."""
    copied = bare(model)
    for layer in (layer for layer in copied.modules() if isinstance(layer, Routed)):
        weights, biases = zip(*(layer._with_delta(i) for i in range(layer.layout.num_experts)), strict=True)
        layer.weight += SCALING * (torch.stack(weights) - layer.weight).sum(0)
        if layer.bias is not None:
            layer.bias += SCALING * (torch.stack(biases) - layer.bias).sum(0)
    return copied


def _nearness(at: Bench, features: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
    """How near test inputs are to prototypes of training inputs: (N, T)."""
    train, test = (
        [torch.cat([features(batch) for batch, _ in at.batches(task, split)]) for task in at.tasks]
        for split in ("train", "test")
    )
    return -Prototypes._fitted(train).distances(torch.cat(test))


@torch.no_grad()
def _states(models: list[nn.Module], batch: Mapping[str, Tensor]) -> Tensor:
    """The mean and the deviation of each hidden state's tokens but padding: (B, 2 · models · blocks · D)."""
    found = []
    for model in models:
        states = torch.stack(model(**batch, output_hidden_states=True).hidden_states, dim=1)  # (B, blocks, N, D)
        mask = batch.get("attention_mask", torch.ones(states.shape[0], states.shape[2]))[:, None, :, None]
        mean = (states * mask).sum(2) / mask.sum(2)
        variance = ((states - mean[:, :, None]).square() * mask).sum(2) / mask.sum(2)
        found += [mean.flatten(1), variance.sqrt().flatten(1)]
    return torch.cat(found, dim=1)
