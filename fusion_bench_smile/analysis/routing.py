"""Does the router find the expert? For inputs of a known task, what every layer picks (arXiv 2408.10174, section 4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from ..layers import Routed
from ..routing import record_routing
from .inputs import Call

log = logging.getLogger(__name__)

COINCIDING = 0.99  # cosine of a principal angle


@torch.no_grad()
def routing_by_task(model: nn.Module, calls: Mapping[str, Sequence[Call]], experts: Sequence[str]) -> pd.DataFrame:
    """What every router picks for the inputs of each task. Padding, where the model is told of it, doesn't count.

    Args:
        model: an upscaled one.
        calls: task → calls of the model with inputs of that task.
        experts: their names, in the model's order.

    Returns:
        One row for each layer, task and expert: ``layer``, ``task``, ``expert``, ``share`` (of the task's tokens'
        weights that go to the expert, from 0 to 1) and ``entropy`` (mean of the softmax over all experts, relative to
        an even choice: the same for all experts of a layer and task).
    """
    rows = []
    for task, of_task in calls.items():
        with record_routing(model) as routing:
            for call in of_task:
                call(model)
        for layer, seen in routing.items():
            total, entropies, tokens = torch.zeros(len(experts), dtype=torch.float64), 0.0, 0
            for number, call in enumerate(of_task):
                keep = call.real(seen.scores[number])
                scores = seen.scores[number][keep].double()
                choices, weights = seen.choices[number][keep], seen.weights[number][keep]
                total.index_add_(0, choices.flatten().cpu(), weights.flatten().double().cpu())
                logs = scores.log_softmax(-1)
                entropies -= float((logs.exp() * logs).sum())
                tokens += len(scores)
            entropy = entropies / tokens / torch.tensor(float(len(experts))).log().item()
            shares = (total / total.sum()).tolist()
            rows += [
                {"layer": layer, "task": task, "expert": name, "share": share, "entropy": entropy}
                for name, share in zip(experts, shares, strict=True)
            ]
    return pd.DataFrame(rows)


def confusion(routing: pd.DataFrame) -> pd.DataFrame:
    """Task × expert: the share of a task's tokens that an expert serves, mean over the layers. Rows add up to 1."""
    tasks, experts = routing["task"].unique(), routing["expert"].unique()
    return routing.pivot_table(index="task", columns="expert", values="share").loc[tasks, experts]


def layer_accuracy(routing: pd.DataFrame) -> pd.Series:
    """For each layer the share of tokens that go to their task's own expert, mean over the tasks that have one."""
    own = routing[routing["task"] == routing["expert"]]
    return own.groupby("layer", sort=False)["share"].mean()


def layer_load(routing: pd.DataFrame) -> pd.DataFrame:
    """Layer × expert: the share of all tasks' tokens, each task counting the same. Rows add up to 1."""
    layers, experts = routing["layer"].unique(), routing["expert"].unique()
    return routing.pivot_table(index="layer", columns="expert", values="share").loc[layers, experts]


@torch.no_grad()
def coinciding_gates(model: nn.Module, experts: Sequence[str]) -> pd.DataFrame:
    """Pairs of experts whose router rows in a layer nearly span the same space: no score can tell them apart.

    Returns:
        One row for each layer and pair: ``layer``, ``first``, ``second``, ``cosine`` (of the largest principal angle
        between their router rows' spans; of the smaller span where they differ in rank). Pairs above `COINCIDING` are
        logged as warnings.
    """
    rows = []
    for name, layer in model.named_modules():
        gate = layer.rows("gate") if isinstance(layer, Routed) else None
        if gate is None:
            continue
        spans = [_span(rows_of) for rows_of in gate.double().split(list(layer.layout.gate_ranks))]
        for i, first in enumerate(spans):
            for j in range(i + 1, len(spans)):
                if not (len(first) and len(spans[j])):
                    continue
                cosine = float(torch.linalg.svdvals(first @ spans[j].mT).min())
                rows.append({"layer": name, "first": experts[i], "second": experts[j], "cosine": cosine})
                if cosine > COINCIDING:
                    log.warning(
                        "%s: the router rows of %s and %s nearly coincide (cosine %.3f): their scores don't tell "
                        "which of the two an input needs", name, experts[i], experts[j], cosine,
                    )  # fmt: skip
    return pd.DataFrame(rows, columns=["layer", "first", "second", "cosine"])


@torch.no_grad()
def token_choices(model: nn.Module, call: Call, layer: str) -> Tensor:
    """The first expert of every token in one layer: (batch, tokens), expert numbers."""
    with record_routing(model) as routing:
        call(model)
    return routing[layer].choices[0][..., 0]


def _span(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT).Q.mT
