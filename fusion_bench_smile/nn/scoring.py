"""Router scores: how well each expert fits a token (arXiv 2408.10174, section 4). Pure functions of a routed layer.

T is the number of experts, pᵢⱼ = vᵢⱼᵀx the projection of a token x on the j-th router row of expert i, sᵢⱼ the
singular value of that row. A layer has no router where it has one expert, or where only biases were changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .layout import is_uniform

if TYPE_CHECKING:
    from .routed import RoutedLayer

RIDGE = 0.03  # added to the diagonal of the Gram matrix of the router rows, which is 1


def router_scores(layer: RoutedLayer, x: Tensor) -> Tensor | None:
    """The paper's score of every expert for every token: (Σⱼ pᵢⱼ²)^½.

    Args:
        layer: A routed layer.
        x: (…, in), its input.

    Returns:
        (…, T), float32, or float64 for float64 inputs. None without a router.
    """
    projections = project_on_router(layer, x)
    return None if projections is None else expert_norms(projections, layer.layout.gate_ranks)


def project_on_router(layer: RoutedLayer, x: Tensor) -> Tensor | None:
    """The projections of x (…, in) on the router rows: (…, Σ gate_ranks). None without a router.

    The result is at least float32, also under autocast: rounded scores choose wrong experts.
    """
    gate = layer.rows("gate")
    if gate is None:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not torch.is_autocast_enabled(x.device.type):
        return layer.project(x.to(dtype), gate.to(dtype))
    with torch.autocast(x.device.type, enabled=False):
        return layer.project(x.to(dtype), gate.to(dtype))


def energy_shares(layer: RoutedLayer, x: Tensor) -> Tensor | None:
    """The share of each token's energy that an expert explains: Σⱼ cᵢⱼ² / ‖x‖² with `dual_coefficients` c.

    Returns:
        (…, T) for tokens x (…, in). None without a router.
    """
    projections = project_on_router(layer, x)
    if projections is None:
        return None
    return _energies(layer, dual_coefficients(layer, projections)) / token_energies(layer, x)


def routing_features(layer: RoutedLayer, x: Tensor) -> Tensor | None:
    """The features of tokens x (…, in) that prototypes are fitted to: (…, 2·T). None without a router.

    First the `energy_shares` of all experts, then Σⱼ sᵢⱼ² pᵢⱼ² / ‖x‖².
    """
    projections = project_on_router(layer, x)
    if projections is None:
        return None
    weighted = projections * router_singular_values(layer).to(projections.dtype)
    both = [_energies(layer, dual_coefficients(layer, projections)), _energies(layer, weighted)]
    return torch.cat(both, dim=-1) / token_energies(layer, x)


def _energies(layer: RoutedLayer, values: Tensor) -> Tensor:
    """The sum of squares of each expert's columns of values (…, Σ gate_ranks): (…, T)."""
    return expert_norms(values, layer.layout.gate_ranks).square()


def expert_norms(values: Tensor, gate_ranks: Sequence[int]) -> Tensor:
    """The norm of each expert's columns of values (…, Σ gate_ranks): (…, T)."""
    if is_uniform(gate_ranks):
        return torch.linalg.vector_norm(values.unflatten(-1, (len(gate_ranks), gate_ranks[0])), dim=-1)
    blocks = values.split(list(gate_ranks), -1)
    return torch.stack([torch.linalg.vector_norm(block, dim=-1) for block in blocks], -1)


def dual_coefficients(layer: RoutedLayer, projections: Tensor) -> Tensor:
    """The coefficients of tokens in the dual basis of all router rows G: (GGᵀ + ridge)⁻¹ Gx, (…, Σ gate_ranks).

    A direction that several experts have is divided among them. Directions that all experts share, such as those of
    LoRA's random A, then say little about an input, and those of one expert alone say most.
    """
    with torch.autocast(projections.device.type, enabled=False):
        return projections @ _gram_inverse(layer, projections.dtype)


class _Version(NamedTuple):
    """What the rows of a stored tensor depend on."""

    storages: tuple[StorageWeakRef, ...]  # of the stored tensor and its scales: an address is used again, these are not
    versions: tuple[object, ...]
    kinds: tuple[object, ...]


_inverses: WeakKeyDictionary[RoutedLayer, tuple[_Version, Tensor]] = WeakKeyDictionary()


def _gram_inverse(layer: RoutedLayer, dtype: torch.dtype) -> Tensor:
    """(GGᵀ + ridge)⁻¹ of the router rows G, which is kept until they change: (Σ gate_ranks, Σ gate_ranks)."""
    version, known = _gate_version(layer, dtype), _inverses.get(layer)
    if version is not None and known is not None and known[0] == version:
        return known[1]
    with torch.inference_mode(False), torch.no_grad():
        gate = layer.rows("gate")
        assert gate is not None
        gate = gate.to(dtype)
        gram = gate @ gate.mT + RIDGE * torch.eye(len(gate), dtype=dtype, device=gate.device)
        inverse = torch.linalg.inv_ex(gram).inverse  # inv_ex does not synchronise with the host
    if version is not None:
        _inverses[layer] = version, inverse
    return inverse


def _gate_version(layer: RoutedLayer, dtype: torch.dtype) -> _Version | None:
    """The version of the router rows; None where it is unknown: to a compiler, and for tensors of inference mode."""
    stored, scales = layer._parameters["gate"], layer._parameters["gate_scale"]
    tensors = [tensor for tensor in (stored, scales) if tensor is not None]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or stored is None:
        return None
    if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
        return None
    storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
    versions = tuple(number for tensor in tensors for number in (tensor._version, tensor.storage_offset()))
    kinds = (id(stored), stored.dtype, stored.device, stored.stride(), layer.weight.dtype, dtype)
    return _Version(storages, versions, kinds)


def router_singular_values(layer: RoutedLayer) -> Tensor:
    """The singular value of each router row: (Σ gate_ranks,), float32; zero for rows that are no expert's direction."""
    layout, up = layer.layout, layer.rows("up")
    values = layer.weight.new_zeros(0).float() if up is None else torch.linalg.vector_norm(up.float(), dim=1)
    sizes = zip(values.split(list(layout.low_ranks)), layout.shared_ranks, layout.gate_ranks, strict=True)
    return torch.cat([F.pad(s[:shared], (0, gate_rank - shared)) for s, shared, gate_rank in sizes])


def token_energies(layer: RoutedLayer, x: Tensor) -> Tensor:
    """‖x‖² of every token of x (…, in): (…, 1), above zero."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    ones = squares.new_ones(1, layer.weight_matrix(layer.weight).shape[1])
    return layer.project(squares, ones).clamp(min=torch.finfo(squares.dtype).tiny)


def select_experts(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts that serve tokens with scores (…, T), and their weights: both (…, top_k).

    A softmax over the kept scores equals the paper's softmax over all, top-k, and renormalisation.
    """
    kept, experts = scores.topk(top_k, dim=-1)
    return experts, torch.ones_like(kept) if top_k == 1 else kept.softmax(dim=-1)


def routing_weights(scores: Tensor, top_k: int) -> Tensor:
    """The weight of every expert for scores (…, T): (…, T), at most `top_k` of them not zero."""
    experts, weights = select_experts(scores, top_k)
    return torch.zeros_like(scores).scatter(-1, experts, weights)
