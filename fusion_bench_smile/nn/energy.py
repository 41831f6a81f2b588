"""The share of a token's energy that each expert explains: the score of whole inputs. Pure functions of a routed layer.

T is the number of experts, vᵢⱼ the j-th router row of expert i and sᵢⱼ its singular value. The rows of all experts
together are G. In their dual basis (GGᵀ + ridge)⁻¹G a direction that several experts have is divided among them:
directions that all experts share, such as those of LoRA's random A, then say little about an input, and those of one
expert alone say most.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from .scoring import expert_norms, project_rows, without_autocast
from .versions import Version, version_of

if TYPE_CHECKING:
    from .routed import RoutedLayer

RIDGE = 0.03  # added to the diagonal of the Gram matrix GGᵀ, which is 1
# Of each expert, the leading ones: with more, fewer inputs find their expert first, and each costs time. Many experts
# share directions, and need more of them (docs/dinov2_results.md, fourteen tasks).
SCORED_ROWS, SCORED_ROWS_PER_EXPERT = 16, 2


def num_scored_rows(num_experts: int) -> int:
    """The number of router rows of each expert, at most, that score whole inputs without calibration."""
    return max(SCORED_ROWS, SCORED_ROWS_PER_EXPERT * num_experts)


def energy_shares(layer: RoutedLayer, x: Tensor, rows: int | None = SCORED_ROWS) -> Tensor | None:
    """The share of each token's energy that an expert explains: Σⱼ cᵢⱼ² / ‖x‖², with c the product with the dual rows.

    Args:
        layer: A routed layer.
        x: (…, in), its input.
        rows: The number of router rows of each expert, at most; None takes all.

    Returns:
        (…, T), at least float32. None without a router.
    """
    return _shares(layer, x, rows, weighted=False)


def routing_features(layer: RoutedLayer, x: Tensor, rows: int | None = SCORED_ROWS) -> Tensor | None:
    """The features of tokens x (…, in) that prototypes are fitted to: (…, 2·T). None without a router.

    First the `energy_shares` of all experts, then Σⱼ sᵢⱼ²(vᵢⱼᵀx)² / ‖x‖².
    """
    return _shares(layer, x, rows, weighted=True)


def token_energies(layer: RoutedLayer, x: Tensor) -> Tensor:
    """‖x‖² of every token of x (…, in): (…, 1), above zero."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if layer.can_group_tokens:  # each is a vector of x
        energies = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square()
    else:
        squares = x.to(dtype).square()
        energies = project_rows(layer, squares, squares.new_ones(1, layer.weight_matrix(layer.weight).shape[1]))
    return energies.clamp(min=torch.finfo(dtype).tiny)


def router_singular_values(layer: RoutedLayer) -> Tensor:
    """The singular value of each router row: (Σ gate_ranks,), float32; zero for rows that are no expert's direction."""
    layout, up = layer.layout, layer.rows("up")
    values = layer.weight.new_zeros(0).float() if up is None else torch.linalg.vector_norm(up.float(), dim=1)
    sizes = zip(values.split(list(layout.low_ranks)), layout.shared_ranks, layout.gate_ranks, strict=True)
    return torch.cat([F.pad(s[:shared], (0, gate_rank - shared)) for s, shared, gate_rank in sizes])


def _shares(layer: RoutedLayer, x: Tensor, rows: int | None, weighted: bool) -> Tensor | None:
    if layer.gate is None:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    sizes = _used_ranks(layer.layout.gate_ranks, rows)
    products = project_rows(layer, x.to(dtype), _scoring_rows(layer, dtype, sizes, weighted))
    return expert_norms(products, sizes * (2 if weighted else 1)).square() / token_energies(layer, x)


def _used_ranks(gate_ranks: Sequence[int], rows: int | None) -> tuple[int, ...]:
    return tuple(gate_ranks if rows is None else (min(rank, rows) for rank in gate_ranks))


_kept: WeakKeyDictionary[RoutedLayer, tuple[Version, Tensor]] = WeakKeyDictionary()


def forget_rows(layer: RoutedLayer) -> None:
    """Forget what is kept of the router rows: fused optimizers change them without a trace."""
    _kept.pop(layer, None)


def _scoring_rows(layer: RoutedLayer, dtype: torch.dtype, sizes: tuple[int, ...], weighted: bool) -> Tensor:
    """The rows that tokens are multiplied with, kept until the router rows change: (Σ sizes, in), or twice as many."""
    names = ("gate", "gate_scale", "up", "up_scale") if weighted else ("gate", "gate_scale")
    tensors = [layer._parameters[name] for name in names]
    version, known = version_of(tensors, layer.weight.dtype, dtype, sizes, weighted), _kept.get(layer)
    if version is not None and known is not None and known[0] == version:
        return known[1]
    with torch.inference_mode(False), torch.no_grad(), without_autocast(layer.weight.device.type):
        rows = _compute_rows(layer, dtype, sizes, weighted)
    if version is not None:
        _kept[layer] = version, rows
    return rows


def _compute_rows(layer: RoutedLayer, dtype: torch.dtype, sizes: tuple[int, ...], weighted: bool) -> Tensor:
    """The dual rows, and with `weighted` the router rows times their singular values."""
    gate, ranks = layer.rows("gate"), layer.layout.gate_ranks
    assert gate is not None
    starts = accumulate(ranks, initial=0)
    leading = torch.tensor([start + row for start, size in zip(starts, sizes, strict=False) for row in range(size)])
    leading = leading.to(gate.device, torch.long)
    rows = gate.to(dtype).index_select(0, leading)
    gram = rows @ rows.mT + RIDGE * torch.eye(len(rows), dtype=dtype, device=rows.device)
    dual = torch.linalg.inv_ex(gram).inverse @ rows  # inv_ex does not synchronise with the host
    if not weighted:
        return dual
    return torch.cat([dual, rows * router_singular_values(layer).to(rows).index_select(0, leading)[:, None]])
