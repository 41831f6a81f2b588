"""Router scores: how well each expert fits a token (arXiv 2408.10174, section 4). Pure functions of a routed layer.

T is the number of experts. A layer has no router where it has one expert, or where only biases were changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import is_uniform

if TYPE_CHECKING:
    from .routed import RoutedLayer


def router_scores(layer: RoutedLayer, x: Tensor) -> Tensor | None:
    """The paper's score of every expert for every token: the norm of its projections on the expert's router rows.

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
    return project_rows(layer, x.to(dtype), gate.to(dtype))


def project_rows(layer: RoutedLayer, x: Tensor, rows: Tensor) -> Tensor:
    """The products of x (…, in) with rows (r, in) in their dtype, also under autocast: (…, r)."""
    with without_autocast(x.device.type):
        return layer.project(x, rows)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast; it costs nothing where there is none."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, such as meta, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def is_traced() -> bool:
    """Whether a compiler, an export or a trace records the operations, which must then not depend on the routing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def expert_norms(values: Tensor, gate_ranks: Sequence[int]) -> Tensor:
    """The norm of each expert's columns of values (…, Σ gate_ranks): (…, T)."""
    if is_uniform(gate_ranks):
        return torch.linalg.vector_norm(values.unflatten(-1, (len(gate_ranks), gate_ranks[0])), dim=-1)
    blocks = values.split(list(gate_ranks), -1)
    return torch.stack([torch.linalg.vector_norm(block, dim=-1) for block in blocks], -1)


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
