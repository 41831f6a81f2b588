"""Merged weights W₀ + Σᵢ wᵢΔWᵢ of one choice of experts. While it holds, a routed layer costs what a plain one does."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .versions import Version, version_of

if TYPE_CHECKING:
    from .routed import RoutedLayer

KEPT_BYTES = 2**31  # of the merged weights of one model, at most

Choice = tuple[tuple[int, float], ...]  # the experts of an input with their weights, those above zero
Parameters = tuple[Tensor, Tensor | None]  # weight and bias


def merge(layer: RoutedLayer, choice: Choice) -> Parameters:
    """The weight and bias of the plain layer plus the experts' deltas, times their weights."""
    weight, bias = layer.weight, cast("Tensor | None", layer.bias)
    if any(layer.layout.ranks[expert] for expert, _ in choice):
        weight = weight.clone(memory_format=torch.contiguous_format)  # otherwise its matrix could be a copy
    for expert, share in choice:
        dense, up = layer.rows("dense", expert), layer.rows("up", expert)
        if dense is not None:
            layer.weight_matrix(weight).add_(dense[0], alpha=share)
        elif up is not None:
            layer.weight_matrix(weight).addmm_(up.mT, cast(Tensor, layer.directions(expert)), alpha=share)
        if layer.expert_bias is not None:
            change = share * layer.expert_bias[expert]
            bias = change if bias is None else bias + change
    return weight, bias


class MergedWeights:
    """The merged weights of the choices that were used last, for the layers of one model.

    All of them take at most `max_bytes`. The choice that was not used for longest is dropped first. A copy of the
    object is empty.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Choice, dict[RoutedLayer, tuple[Version, Parameters]]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.max_bytes,)

    @property
    def num_bytes(self) -> int:
        """The size of all kept weights."""
        return sum(weight.nbytes for layers in self._kept.values() for _, (weight, _) in layers.values())

    def get(self, layer: RoutedLayer, choice: Choice) -> Parameters | None:
        """The merged weight and bias of a layer; None if they do not fit beside the others of this choice."""
        version = version_of(layer._parameters.values())
        with self._lock:
            layers = self._kept.setdefault(choice, {})
            self._kept.move_to_end(choice)
            known = layers.get(layer)
            if known is not None and known[0] == version:
                return known[1]
            layers.pop(layer, None)
            if version is None or not self._make_room(layer.weight.nbytes):
                return None
            layers[layer] = version, merge(layer, choice)
            return layers[layer][1]

    def _make_room(self, size: int) -> bool:
        while self.num_bytes + size > self.max_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self.num_bytes + size <= self.max_bytes
