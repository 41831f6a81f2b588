"""Router accuracy: which experts the routers choose for inputs of a known task (arXiv 2408.10174, section 4)."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor, nn

from ..nn import LayerRouting, layers_with_router, record_routing
from .capture import ModelCall

log = logging.getLogger(__name__)
COINCIDING = 0.99  # cosine of the largest principal angle


@torch.no_grad()
def routing_by_task(model: nn.Module, calls: Mapping[str, Sequence[ModelCall]], experts: Sequence[str]) -> pd.DataFrame:
    """The routing of every layer for the inputs of each task; padding is excluded where the call has an attention mask.

    Args:
        experts: Names of the T experts, in the order of the model.

    Returns:
        One row for each layer, task and expert: ``layer``, ``task``, ``expert``, ``share`` (of the routing weights of
        the task's tokens, from 0 to 1) and ``entropy`` (mean entropy of the softmax over all experts, relative to the
        uniform distribution; the same for all experts of a layer and task).
    """
    rows = []
    for task, task_calls in calls.items():
        with record_routing(model) as routing:
            for call in task_calls:
                call(model)
        for layer, recorded in routing.items():
            shares, entropy = _shares_and_entropy(recorded, task_calls)
            for name, share in zip(experts, shares, strict=True):
                rows.append({"layer": layer, "task": task, "expert": name, "share": share, "entropy": entropy})
    return pd.DataFrame(rows)


def _shares_and_entropy(recorded: LayerRouting, calls: Sequence[ModelCall]) -> tuple[list[float], float]:
    """The share of each expert (T,) and the relative entropy, over all tokens except padding."""
    count = recorded.scores[0].shape[-1]
    total, entropies, tokens = torch.zeros(count, dtype=torch.float64), 0.0, 0
    for call, scores, experts, weights in zip(calls, recorded.scores, recorded.experts, recorded.weights, strict=True):
        mask = call.token_mask(scores)
        total.index_add_(0, experts[mask].flatten().cpu(), weights[mask].flatten().double().cpu())
        entropies += float(torch.special.entr(scores[mask].double().softmax(-1)).sum())
        tokens += int(mask.sum())
    return (total / total.sum()).tolist(), entropies / tokens / math.log(count)  # the entropy of a uniform distribution


def _mean_shares(routing: pd.DataFrame, rows: str) -> pd.DataFrame:
    table = routing.pivot_table(index=rows, columns="expert", values="share")
    return table.loc[routing[rows].unique(), routing["expert"].unique()]


def confusion(routing: pd.DataFrame) -> pd.DataFrame:
    """Task × expert: the share of the task's tokens that the expert serves, averaged over the layers; rows sum to 1."""
    return _mean_shares(routing, "task")


def layer_accuracy(routing: pd.DataFrame) -> pd.Series:
    """Router accuracy of each layer, from 0 to 1: the share of tokens that are served by their task's expert.

    It is the mean over the tasks that have an expert of the same name.
    """
    correct = routing[routing["task"] == routing["expert"]]
    return correct.groupby("layer", sort=False)["share"].mean()


def layer_load(routing: pd.DataFrame) -> pd.DataFrame:
    """Layer × expert: the share of tokens that the expert serves, averaged over the tasks; rows sum to 1."""
    return _mean_shares(routing, "layer")


@torch.no_grad()
def coinciding_gates(model: nn.Module, experts: Sequence[str]) -> pd.DataFrame:
    """Compare the spans of the router rows of each pair of experts, named in the order of the model.

    Pairs with a cosine above `COINCIDING`, which the scores cannot separate, are logged as warnings.

    Returns:
        One row for each layer and pair: ``layer``, ``first``, ``second`` and ``cosine``, the cosine of the largest
        principal angle between the two spans (of the smaller one, where the ranks differ).
    """
    rows = []
    for name, layer in layers_with_router(model).items():
        gates = {expert: layer.rows("gate", number) for number, expert in enumerate(experts)}
        # orthonormal rows (gate rank, in)
        spans = {expert: torch.linalg.qr(gate.double().mT).Q.mT for expert, gate in gates.items() if gate is not None}
        for first, second in combinations(spans, 2):
            cosine = float(torch.linalg.svdvals(spans[first] @ spans[second].mT).min())
            rows.append({"layer": name, "first": first, "second": second, "cosine": cosine})
    table = pd.DataFrame(rows, columns=["layer", "first", "second", "cosine"])
    for row in table[table["cosine"] > COINCIDING].to_dict("records"):
        log.warning(
            "%(layer)s: the router rows of %(first)s and %(second)s nearly coincide (cosine %(cosine).3f): "
            "their scores cannot separate the two experts",
            row,
        )
    return table


@torch.no_grad()
def token_choices(model: nn.Module, call: ModelCall, layer: str) -> Tensor:
    """The index of the first expert of every token in a layer with a router: (batch, tokens), int64."""
    with record_routing(model) as routing:
        call(model)
    return routing[layer].experts[0][..., 0]
