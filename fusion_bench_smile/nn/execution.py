"""The execution of a routed layer. Pure functions of a layer and its input that compute the same result.

- *masked*: every token with every expert, times its routing weight, which is zero for most experts. No operation
  depends on the routing, and none synchronises with the host: the layer can be compiled and exported.
- *grouped*: the tokens of each expert are gathered and computed with this expert alone; so are whole inputs, where
  their experts were chosen beforehand.
- *merged*: one choice of experts for all tokens is added to W₀, see `merged_weights`.

T is the number of experts, B the number of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .compatibility import is_wrapped
from .layout import is_uniform
from .merged_weights import Parameters, merge
from .scoring import expert_norms, is_autocast, is_traced, project_on_router, routing_weights, select_experts

if TYPE_CHECKING:
    from .routed import RoutedLayer
    from .routing_state import RoutingState

# On a CPU, gathering the tokens of an expert costs as much as this many multiply-adds, and several times as many where
# the result is weighted. A group of few tokens takes as long as one of MIN_TOKENS, since the weights have to be read.
GROUP_COST, WEIGHTED_GROUP_COST = 10_000_000, 40_000_000
MIN_TOKENS = 8
MOST_INPUTS = 0.7  # an expert of a larger share of a batch is computed for all: gathering a part costs more


class InputGroups(NamedTuple):
    """The inputs of a batch, grouped by the experts that serve them."""

    num_inputs: int  # B
    members: list[tuple[int, Tensor]]  # the experts that serve at least one input, with the indices of these (n,)


def routed_output(layer: RoutedLayer, x: Tensor) -> Tensor:
    """The output of a routed layer for x (…, in): (…, out)."""
    router = layer.input_router
    state = None if router is None else router.state_for(layer)
    if router is None or state is None:
        return by_token(layer, x)
    weights = router.weights(state, layer, x)
    merged = None if weights is None else merged_parameters(layer, x, state)
    if merged is not None:
        return layer.plain_output(x, *merged)
    groups = router.group_inputs(state, weights) if weights is not None and may_group_inputs(layer, x) else None
    if groups is not None and not grouping_inputs_pays(layer, x, groups):
        groups = None
    output = layer.plain_output(x, layer.weight, cast("Tensor | None", layer.bias))
    return output if weights is None else by_input(layer, x, output, weights, groups)


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


def merged_parameters(layer: RoutedLayer, x: Tensor, state: RoutingState) -> Parameters | None:
    """The weight and bias with the experts of all inputs added to them, where they have one choice and it pays.

    The sum is kept while the choice holds: while a model generates, or in a ``use_experts`` block. For a single call it
    has to cost less than the products of the tokens with the factors.
    """
    router = layer.input_router
    if router is None or is_traced() or layer.smile_config.execution != "auto":
        return None
    if torch.is_grad_enabled():
        router.merged_weights.clear()  # the model may be trained
        return None
    if not _sum_is_exact(layer, x) or (choice := state.one_choice) is None:
        return None
    if state.merges:
        return router.merged_weights.get(layer, choice)
    out_features, in_features = layer.weight_matrix(layer.weight).shape
    tokens = x.numel() // in_features
    pays = bool(layer.layout.dense_experts) or tokens * (in_features + out_features) > in_features * out_features
    return merge(layer, choice) if pays else None


def _sum_is_exact(layer: RoutedLayer, x: Tensor) -> bool:
    """Whether weights are added and multiplied in float32 at least; otherwise deltas would be lost in the rounding."""
    dtype = layer.weight.dtype
    return dtype in (torch.float32, torch.float64) and not is_wrapped(layer.weight) and not is_autocast(x.device.type)


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


def may_group_inputs(layer: RoutedLayer, x: Tensor) -> bool:
    """Whether computing the inputs of each expert with this expert alone could pay, before their groups are known."""
    if is_traced() or layer.smile_config.execution == "masked":
        return False
    return _must_group_inputs(layer) or _factor_products(layer, x) > GROUP_COST


def grouping_inputs_pays(layer: RoutedLayer, x: Tensor, groups: InputGroups) -> bool:
    """Whether it does for these groups, which are the same in all layers, and known from the second one on."""
    if _must_group_inputs(layer):
        return True
    computed = sum(len(inputs) for _, inputs in groups.members) / max(1, groups.num_inputs * layer.layout.num_experts)
    return (1 - computed) * _factor_products(layer, x) > GROUP_COST * len(groups.members)


def _must_group_inputs(layer: RoutedLayer) -> bool:
    return layer.smile_config.execution != "auto" or bool(layer.layout.dense_experts)


def _factor_products(layer: RoutedLayer, x: Tensor) -> int:
    """The multiply-adds of the tokens of x with the factors of all experts."""
    out_features, in_features = layer.weight_matrix(layer.weight).shape
    return max(x.numel() // in_features, MIN_TOKENS) * sum(layer.layout.low_ranks) * (in_features + out_features)


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
    up, dense = layer.rows("up"), layer.rows("dense")
    if up is not None:
        output = _add_product(output, _weighted_directions(layer, x, projections, weights), up)
    weights = weights.to(output.dtype)
    if dense is not None:
        for row, expert in enumerate(layer.layout.dense_experts):
            output = output + weights[..., expert, None] * layer.project(x, dense[row])
    if layer.expert_bias is not None:
        output = _add_product(output, weights, layer.expert_bias)
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


def by_input(layer: RoutedLayer, x: Tensor, output: Tensor, weights: Tensor, groups: InputGroups | None) -> Tensor:
    """`output` (B, …, out) plus the experts' contributions, with one weight (B, T) for all tokens of an input."""
    if groups is None:
        shape = (weights.shape[0], *[1] * (output.ndim - 2), weights.shape[1])  # len() would fix the size of an export
        token_weights = weights.view(shape).expand(*output.shape[:-1], -1)
        return masked(layer, x, output, project_on_router(layer, x), token_weights)
    token_shape = (-1, *[1] * (output.ndim - 2))
    if layer.expert_bias is not None:
        biases = weights.to(layer.expert_bias.dtype) @ layer.expert_bias  # (B, out)
        output = output + biases.view(*token_shape, biases.shape[-1]).to(output.dtype)
    for expert, inputs in groups.members:
        if not layer.layout.ranks[expert]:
            continue
        most = len(inputs) > MOST_INPUTS * len(x)  # the others have the weight zero
        share = (weights[:, expert] if most else weights[inputs, expert]).view(*token_shape, 1)
        product = delta_product(layer, expert, x if most else x.index_select(0, inputs), share).to(output.dtype)
        output = output + product if most else output.index_add_(0, inputs, product)
    return output


def delta_product(layer: RoutedLayer, expert: int, x: Tensor, share: Tensor) -> Tensor:
    """The product of x (…, in) with the delta of an expert that has one, times its share (…, 1): (…, out)."""
    dense, up = layer.rows("dense", expert), layer.rows("up", expert)
    if dense is not None:
        product = layer.project(x, dense[0])
        return product * share.to(product.dtype)
    projections = layer.project(x, cast(Tensor, layer.directions(expert)))
    return (projections * share.to(projections.dtype)) @ cast(Tensor, up)


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
