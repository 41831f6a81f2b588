"""The execution of a routed layer whose router chooses experts for each token. Pure functions of a layer and its input.

- *masked*: every token with every expert, times its routing weight, which is zero for most experts. No operation
  depends on the routing, and none synchronises with the host: the layer can be compiled and exported.
- *grouped*: the tokens of each expert are gathered and computed with this expert alone.

Both compute the same result. T is the number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import is_uniform
from .scoring import expert_norms, is_traced, project_on_router, routing_weights, select_experts

if TYPE_CHECKING:
    from .routed import RoutedLayer

# On a CPU, gathering the tokens of an expert costs as much as this many multiply-adds, and several times as many where
# the result is weighted. A group of few tokens takes as long as one of MIN_TOKENS, since the weights have to be read.
GROUP_COST, WEIGHTED_GROUP_COST = 10_000_000, 40_000_000
MIN_TOKENS = 8
JOINT_TOKENS = 4  # with more tokens for each row of the factors, biases are added in the same product


def by_token(layer: RoutedLayer, x: Tensor) -> Tensor:
    """The output (…, out) for x (…, in) where the router chooses experts for each token."""
    output = layer.plain_output(x, layer.weight, cast("Tensor | None", layer.bias))
    projections = project_on_router(layer, x)
    if projections is None:  # one expert, or changed biases alone: all experts have the same weight
        uniform = output.new_full((*output.shape[:-1], layer.layout.num_experts), 1 / layer.layout.num_experts)
        return masked(layer, x, output, None, uniform)
    scores = expert_norms(projections, layer.layout.gate_ranks)
    layer.call_routing_hooks(x, scores)
    if is_one_token(layer, x):
        return one_token(layer, x, output, projections, scores)
    if grouping_pays(layer, x):
        return grouped(layer, x, output, projections, scores)
    top_k = layer.smile_config.top_k
    weights = scores.softmax(dim=-1) if top_k >= layer.layout.num_experts else routing_weights(scores, top_k)
    return masked(layer, x, output, projections, weights)


def grouping_pays(layer: RoutedLayer, x: Tensor) -> bool:
    """Whether the tokens of each expert are gathered for an input (…, in).

    ``execution="auto"`` groups on the CPU where the saved products outweigh the cost of the groups. An accelerator
    would have to wait for the sizes of the groups, and a compiler or an export does not know them.
    """
    layout, config = layer.layout, layer.smile_config
    if not layer.can_group_tokens:
        return False
    if config.execution != "auto":
        return config.execution == "grouped" and config.top_k < layout.num_experts and not torch.jit.is_tracing()
    cost = GROUP_COST if config.top_k == 1 else WEIGHTED_GROUP_COST
    return x.device.type == "cpu" and not is_traced() and _saved_products(layer, x) > cost * _num_groups(layer, x)


def is_one_token(layer: RoutedLayer, x: Tensor) -> bool:
    """Whether an input (…, in) is one token whose experts and their weights can be read as numbers.

    A device would have to be waited for, and gradients reach the weights of several experts.
    """
    if not layer.can_group_tokens or layer.smile_config.execution != "auto":
        return False
    if layer.smile_config.top_k > 1 and torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.numel() == x.shape[-1] and not is_traced()


def _num_groups(layer: RoutedLayer, x: Tensor) -> int:
    tokens = x.numel() // layer.weight_matrix(layer.weight).shape[1]
    return min(layer.layout.num_experts, max(1, tokens) * layer.smile_config.top_k)


def _saved_products(layer: RoutedLayer, x: Tensor) -> float:
    """The multiply-adds with experts that have no weight for a token of x."""
    layout, (out_features, in_features) = layer.layout, layer.weight_matrix(layer.weight).shape
    dense = len(layout.dense_experts) * in_features * out_features
    low_rank = sum(layout.down_ranks) * in_features + sum(layout.low_ranks) * out_features
    unused = max(0.0, 1 - layer.smile_config.top_k / layout.num_experts)
    return (dense + low_rank) * unused * max(x.numel() // in_features, MIN_TOKENS)


def masked(layer: RoutedLayer, x: Tensor, output: Tensor, projections: Tensor | None, weights: Tensor) -> Tensor:
    """`output` (…, out) plus the contribution of every expert, times its weight (…, T)."""
    up, dense, bias = layer.rows("up"), layer.rows("dense"), layer.expert_bias
    if up is not None:
        coefficients = _weighted_directions(layer, x, projections, weights)
        if bias is not None and not is_traced() and coefficients.numel() > JOINT_TOKENS * up.shape[0] ** 2:
            # one product at the price of a copy of the rows: a second one would read and write the output again
            coefficients, up, bias = torch.cat([coefficients, weights], dim=-1), torch.cat([up, bias]), None
        output = _add_product(output, coefficients, up)
    if bias is not None:
        output = _add_product(output, weights, bias)
    if dense is not None:
        weights = weights.to(output.dtype)
        for row, expert in enumerate(layer.layout.dense_experts):
            output = output + weights[..., expert, None] * layer.project(x, dense[row])
    return output


def one_token(layer: RoutedLayer, x: Tensor, output: Tensor, projections: Tensor, scores: Tensor) -> Tensor:
    """`output` (…, out) of a single token, to which the contributions of its experts are added."""
    gate_ranks, shared_ranks = layer.layout.gate_ranks, layer.layout.shared_ranks
    experts, weights = select_experts(scores.flatten(), layer.smile_config.top_k)
    token, projections = x.reshape(1, -1), projections.reshape(1, -1)
    for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
        start = sum(gate_ranks[:expert])
        contribution = _contribution(layer, expert, token, None, projections[:, start : start + shared_ranks[expert]])
        if contribution is not None:
            output = output.add(contribution.view_as(output).to(output.dtype), alpha=weight)
    return output


def grouped(layer: RoutedLayer, x: Tensor, output: Tensor, projections: Tensor, scores: Tensor) -> Tensor:
    """`output` (…, out), to which the contribution of each expert to its tokens is added in place."""
    top_k = layer.smile_config.top_k
    tokens, sums = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
    experts, weights = (values.flatten() for values in select_experts(scores, top_k))  # (N·top_k,)
    projections = projections.flatten(0, -2) if projections.ndim > 1 else projections[None]
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=layer.layout.num_experts).tolist()
    token_indices = order if top_k == 1 else order // top_k
    shared = _group_projections(layer, projections, token_indices, experts.index_select(0, order), counts)
    groups = zip(order.split(counts), token_indices.split(counts), shared, strict=True)
    for expert, (entries, indices, columns) in enumerate(groups):
        contribution = _contribution(layer, expert, tokens, indices, columns) if len(indices) else None
        if contribution is not None:
            if top_k > 1:
                contribution = contribution * weights[entries, None].to(contribution.dtype)
            sums.index_add_(0, indices, contribution.to(output.dtype))
    return output


def _weighted_directions(layer: RoutedLayer, x: Tensor, projections: Tensor | None, weights: Tensor) -> Tensor:
    """The projections of x on the directions of all experts, times the experts' weights (…, T): (…, Σ ranks)."""
    layout, parts = layer.layout, []
    if projections is not None and any(layout.shared_ranks):
        parts.append((projections, layout.gate_ranks, layout.shared_ranks))
    down = layer.rows("down")
    if down is not None:
        parts.append((layer.project(x, down), layout.down_ranks, layout.down_ranks))
    if all(is_uniform(sizes) and is_uniform(kept) for _, sizes, kept in parts):
        blocks = [p.unflatten(-1, (len(sizes), sizes[0]))[..., : kept[0]] for p, sizes, kept in parts]
        return (torch.cat(blocks, dim=-1) * weights[..., None]).flatten(-2)
    split = [_leading_columns(*part) for part in parts]
    experts = zip(weights.split(1, -1), *split, strict=True)
    return torch.cat([block * weight for weight, *blocks in experts for block in blocks], dim=-1)


def _group_projections(
    layer: RoutedLayer, projections: Tensor, token_indices: Tensor, experts: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """For each expert the projections of its tokens on its router rows that are directions: (n, shared rank)."""
    layout = layer.layout
    if not is_uniform(layout.gate_ranks):
        blocks = projections.split(list(layout.gate_ranks), dim=-1)
        groups = zip(blocks, token_indices.split(counts), layout.shared_ranks, strict=True)
        return [block[:, :rank].index_select(0, indices) for block, indices, rank in groups]
    rows = projections.reshape(-1, layout.gate_ranks[0])  # (N·T, gate rank): one gather for all experts
    gathered = rows.index_select(0, token_indices * layout.num_experts + experts).split(counts)
    return [block[:, :rank] for block, rank in zip(gathered, layout.shared_ranks, strict=True)]


def _contribution(
    layer: RoutedLayer, expert: int, tokens: Tensor, indices: Tensor | None, shared: Tensor
) -> Tensor | None:
    """What one expert adds to some tokens (N, in), or to all: (n, out); None for nothing.

    `shared` holds the projections of these tokens on the expert's router rows that are directions.
    """

    def used() -> Tensor:  # gathered only where it is needed
        return tokens if indices is None else tokens.index_select(0, indices)

    bias = None if layer.expert_bias is None else layer.expert_bias[expert]
    dense, up = layer.rows("dense", expert), layer.rows("up", expert)
    if dense is not None:
        return F.linear(used(), dense[0], bias)
    if up is not None:
        down = layer.rows("down", expert)
        projections = shared if down is None else torch.cat([shared, F.linear(used(), down)], dim=-1)
        return F.linear(projections.to(up.dtype), up.mT, bias)
    return None if bias is None else bias.expand(len(shared), -1)


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output (…, n) + left (…, m) @ right (m, n). May write into `output`."""
    flat, left = output.reshape(-1, output.shape[-1]), left.reshape(-1, left.shape[-1]).to(right.dtype)
    # in place neither the mixed dtypes of autocast nor the dynamic sizes of an export are possible
    in_place = flat.dtype == right.dtype and not is_traced()
    return (flat.addmm_(left, right) if in_place else torch.addmm(flat, left, right)).reshape(output.shape)


def _leading_columns(columns: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> list[Tensor]:
    """The first kept[i] of the sizes[i] columns of each expert i."""
    return [block[..., :count] for block, count in zip(columns.split(list(sizes), dim=-1), kept, strict=True)]
