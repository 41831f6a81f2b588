"""Routed layers with random parameters, and the formula of the paper to compare them with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.nn import DENSE, ExpertLayout, RoutedLayer, SmileLinear

UNIFORM = ExpertLayout(ranks=(4, 4, 4), gate_ranks=(2, 2, 2), expert_bias=True)
RAGGED = ExpertLayout(ranks=(4, 0, 2), gate_ranks=(2, 0, 3))
# parameters ("layout", "top_k")
UNIFORM_AND_RAGGED = [pytest.param(UNIFORM, 2, id="uniform"), pytest.param(RAGGED, 1, id="ragged")]


def random_layer(
    layout: ExpertLayout, n_in: int, n_out: int, bias: bool = True, dtype: torch.dtype = torch.float64, **options
) -> SmileLinear:
    """A routed layer with random parameters; `options` are those of `SmileConfig`."""
    layer = SmileLinear(n_in, n_out, bias, layout, SmileConfig(**options), dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return layer


def split(tensor: Tensor | None, sizes: tuple[int, ...]) -> list[Tensor | None]:
    """The rows of each expert; None for a tensor that is empty."""
    return [None] * len(sizes) if tensor is None else list(tensor.split(list(sizes)))


def reference(layer: SmileLinear, x: Tensor) -> Tensor:
    """The formula of the paper, one token at a time, in float64."""
    layout, flat = layer.layout, x.reshape(-1, layer.in_features).double()
    gate, down = split(layer.gate, layout.gate_ranks), split(layer.down, layout.down_ranks)
    up = split(layer.up, layout.low_ranks)
    outputs = []
    for token in flat:
        scores = torch.stack(
            [
                (rows[:rank].double() @ token).norm() if rows is not None else token.new_zeros(())
                for rows, rank in zip(gate, layout.gate_ranks, strict=True)
            ]
        )
        experts = scores.topk(layer.smile_config.top_k).indices.tolist()
        if not any(layout.gate_ranks):
            experts = list(range(layout.num_experts))
        probabilities = torch.softmax(scores, 0)
        total = sum(probabilities[i] for i in experts)
        y = layer.weight.double() @ token + (0 if layer.bias is None else layer.bias.double())
        for i in experts:
            weight = probabilities[i] / total
            if layout.ranks[i] == DENSE:
                y = y + weight * (layer.dense[layout.dense_experts.index(i)].double() @ token)
            elif layout.ranks[i] > 0:
                k = layout.ranks[i]
                shared = [] if gate[i] is None or not layout.shared_router else [gate[i][:k]]
                directions = torch.cat([*shared, *([] if down[i] is None else [down[i]])]).double()
                y = y + weight * ((directions @ token) @ up[i].double())
            if layer.expert_bias is not None:
                y = y + weight * layer.expert_bias[i].double()
        outputs.append(y)
    if not outputs:
        return flat.new_zeros(*x.shape[:-1], layer.out_features)
    return torch.stack(outputs).reshape(*x.shape[:-1], layer.out_features)


# parameters ("layout", "top_k")
LAYOUTS = [
    (UNIFORM, 2),
    (RAGGED, 1),
    (ExpertLayout(ranks=(3, 3), gate_ranks=(2, 2), shared_router=False), 1),
    (ExpertLayout(ranks=(DENSE, DENSE), gate_ranks=(2, 2)), 1),
]


def copy_random_experts(layer: RoutedLayer, linear: SmileLinear) -> None:
    """Give a layer random experts, and a linear layer the same ones and the same weight."""
    with torch.no_grad():
        for name in ("gate", "down", "up", "dense", "expert_bias"):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(torch.randn_like(getattr(layer, name)))
                getattr(linear, name).copy_(getattr(layer, name))
        linear.weight.copy_(layer.weight_matrix(layer.weight))
        linear.bias.copy_(layer.bias)
