"""The execution of a routed layer where whole inputs have their experts. Pure functions of a layer and its input.

- *merged*: one choice of experts for all inputs is added to W₀, see `merged_weights`.
- *batched*: the factors of each input's experts are gathered, and multiplied with its tokens in batched products.
- *grouped*: the inputs of each expert are gathered and computed with this expert alone.
- *masked*: every input with every expert, times its weight, as for tokens.

They compute the same result. B is the number of inputs, T that of experts, n the number of experts of an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .compatibility import is_wrapped
from .layout import is_uniform
from .merged_weights import Parameters, merge
from .scoring import is_autocast, is_traced, project_on_router
from .token_execution import GROUP_COST, masked

if TYPE_CHECKING:
    from .routed import RoutedLayer
    from .routing_state import RoutingState

InputExecution = Literal["masked", "grouped", "batched"]

# On a CPU, in multiply-adds of a large product: to gather a value of the factors or of the tokens, and a multiply-add
# in a product of a group or of a batch.
FACTOR_COST, TOKEN_COST, PRODUCT_COST = 32, 16, 2
MOST_INPUTS = 0.7  # an expert of a larger share of a batch is computed for all: gathering a part costs more


class InputGroups(NamedTuple):
    """The inputs of a batch, grouped by the experts that serve them."""

    num_inputs: int  # B
    members: list[tuple[int, Tensor]]  # the experts that serve at least one input, with the indices of these (n,)


def by_input(layer: RoutedLayer, x: Tensor, state: RoutingState, weights: Tensor) -> Tensor:
    """The output (B, …, out) for x (B, …, in), where the experts have the weights (B, T) for all tokens of an input."""
    parameters = merged_parameters(layer, x, state)
    if parameters is not None:
        return layer.plain_output(x, *parameters)
    output = layer.plain_output(x, layer.weight, cast("Tensor | None", layer.bias))
    execution = execution_of(layer, x, state.num_served)
    if execution == "batched":
        return batched_inputs(layer, x, output, *state.served_inputs(weights))
    if execution == "grouped":
        return grouped_inputs(layer, x, output, weights, state.group_inputs(weights))
    return masked_inputs(layer, x, output, weights)


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
    choice = state.one_choice
    if choice is None or is_autocast(x.device.type):
        return None
    known = router.merged_weights.get(layer, choice) if state.merges else None
    if known is not None or not _sum_is_exact(layer):
        return known
    if state.merges:
        return router.merged_weights.add(layer, choice)
    out_features, in_features = layer.weight_matrix(layer.weight).shape
    tokens = x.numel() // in_features
    pays = bool(layer.layout.dense_experts) or tokens * (in_features + out_features) > in_features * out_features
    return merge(layer, choice) if pays else None


def _sum_is_exact(layer: RoutedLayer) -> bool:
    """Whether weights are added in float32 at least; otherwise deltas would be lost in the rounding."""
    return layer.weight.dtype in (torch.float32, torch.float64) and not is_wrapped(layer.weight)


def execution_of(layer: RoutedLayer, x: Tensor, num_served: int | None) -> InputExecution:
    """How the experts of inputs x (B, …, in) are computed, of which each has `num_served`, None for an unknown number.

    Groups need their sizes, for which an accelerator would be waited for, and which a compiler or export can't know.
    """
    execution, layout = layer.smile_config.execution, layer.layout
    if is_traced() or execution == "masked":
        return "masked"
    if layout.dense_experts:
        return "grouped"
    costs = _costs(layer, x, layout.num_experts if num_served is None else num_served)
    if execution == "grouped":
        del costs["masked"]
    elif x.device.type != "cpu":
        del costs["grouped"]
    return min(costs, key=lambda name: costs[name])


def _costs(layer: RoutedLayer, x: Tensor, num_served: int) -> dict[InputExecution, float]:
    """The cost of each execution, in multiply-adds of a large product."""
    layout, (out_features, in_features) = layer.layout, layer.weight_matrix(layer.weight).shape
    width, inputs, tokens = in_features + out_features, len(x), x.numel() // in_features
    costs: dict[InputExecution, float] = {"masked": tokens * sum(layout.low_ranks) * width}
    share = num_served / layout.num_experts
    products = share * costs["masked"] * PRODUCT_COST
    costs["grouped"] = layout.num_experts * GROUP_COST + products + num_served * tokens * width * TOKEN_COST
    if tokens and layer.can_group_tokens and any(layout.low_ranks):
        rows = num_served * max(layout.low_ranks)
        costs["batched"] = rows * width * (inputs * FACTOR_COST + tokens * PRODUCT_COST)
    return costs


def masked_inputs(layer: RoutedLayer, x: Tensor, output: Tensor, weights: Tensor) -> Tensor:
    """`output` (B, …, out) plus the contributions of all experts, times their weights (B, T)."""
    shape = (weights.shape[0], *[1] * (output.ndim - 2), weights.shape[1])  # len() would fix the size of an export
    token_weights = weights.view(shape).expand(*output.shape[:-1], -1)
    return masked(layer, x, output, project_on_router(layer, x), token_weights)


def batched_inputs(layer: RoutedLayer, x: Tensor, output: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """`output` (B, …, out) plus the contributions of each input's experts (B, n), times their shares (B, n)."""
    layout, inputs, chosen = layer.layout, len(x), experts.flatten()
    tokens, sums = x.reshape(inputs, -1, x.shape[-1]), output.view(inputs, -1, output.shape[-1])
    parts = [
        (layer.rows("gate") if any(layout.shared_ranks) else None, layout.gate_ranks, layout.shared_ranks),
        (layer.rows("down"), layout.down_ranks, layout.down_ranks),
    ]
    blocks = [expert_blocks(rows, sizes, kept) for rows, sizes, kept in parts if rows is not None]
    products = [torch.bmm(tokens, _gather(block, chosen, inputs).mT) for block in blocks]  # (B, tokens, n·rank)
    weights = shares[:, None, :, None].to(products[0].dtype)
    columns = [product.unflatten(-1, (experts.shape[1], -1)) * weights for product in products]
    left = _left_blocks(layer)
    if layer.expert_bias is not None:
        columns.append(weights.expand(-1, tokens.shape[1], -1, -1))
        left.append(layer.expert_bias[:, None])
    factors = _gather(torch.cat(left, dim=1) if len(left) > 1 else left[0], chosen, inputs)
    coefficients = torch.cat(columns, dim=-1).flatten(-2)  # (B, tokens, n·(rank + 1))
    # in place the mixed dtypes of autocast are not possible
    add = sums.baddbmm_ if sums.dtype == factors.dtype == coefficients.dtype else sums.baddbmm
    return add(coefficients.to(factors.dtype), factors).view(output.shape).to(output.dtype)


def expert_blocks(rows: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> Tensor:
    """The first kept[i] of the sizes[i] rows of each expert i, zeros behind fewer rows: (T, max(kept), width)."""
    if is_uniform(sizes) and is_uniform(kept):
        return rows.unflatten(0, (len(sizes), sizes[0]))[:, : kept[0]]
    blocks = zip(rows.split(list(sizes)), kept, strict=True)
    return torch.stack([F.pad(block[:count], (0, 0, 0, max(kept) - count)) for block, count in blocks])


def _left_blocks(layer: RoutedLayer) -> list[Tensor]:
    """The left singular vectors in the order of the directions, shared ones first: blocks (T, ranks, out)."""
    layout, up = layer.layout, cast(Tensor, layer.rows("up"))
    if is_uniform(layout.low_ranks) and is_uniform(layout.shared_ranks):
        return [expert_blocks(up, layout.low_ranks, layout.low_ranks)]
    split = [part for ranks in zip(layout.shared_ranks, layout.down_ranks, strict=True) for part in ranks]
    parts = up.split(split)  # of each expert those of its shared directions, and those of the others
    both = ((torch.cat(parts[::2]), layout.shared_ranks), (torch.cat(parts[1::2]), layout.down_ranks))
    return [expert_blocks(rows, ranks, ranks) for rows, ranks in both if any(ranks)]


def _gather(blocks: Tensor, experts: Tensor, inputs: int) -> Tensor:
    """The blocks (T, m, width) of the experts (B·n,) of all inputs: (B, n·m, width)."""
    return blocks.index_select(0, experts).view(inputs, -1, blocks.shape[-1])


def grouped_inputs(layer: RoutedLayer, x: Tensor, output: Tensor, weights: Tensor, groups: InputGroups) -> Tensor:
    """`output` (B, …, out) plus the contribution of each expert to its inputs, times its weights (B, T)."""
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
