"""Merged weights W₀ + Σᵢ wᵢΔWᵢ of one choice of experts. While it holds, a routed layer costs what a plain one does."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .versions import Version, is_version_of, version_of

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
    """The merged weights of one choice, for the layers of one model, in at most `max_bytes`.

    A choice that calls of the model use in turn with another one is not merged. A copy of the object is empty.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._choice: Choice | None = None
        self._kept: dict[RoutedLayer, tuple[Version, Parameters]] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.max_bytes,)

    def announce(self, choice: Choice) -> bool:
        """Whether a choice is that of the call before. From now on, the weights of others are dropped."""
        with self._lock:
            is_known = choice == self._choice
            if not is_known:
                self._clear()
                self._choice = choice
            return is_known

    def clear(self) -> None:
        """Drop all weights."""
        if self._choice is not None:
            with self._lock:
                self._clear()

    def _clear(self) -> None:
        self._kept, self._choice, self.num_bytes = {}, None, 0

    def get(self, layer: RoutedLayer, choice: Choice) -> Parameters | None:
        """The merged weight and bias of a layer; None if there are none that are right."""
        with self._lock:
            known = self._kept.get(layer)
            if known is None or choice != self._choice or not is_version_of(known[0], _tensors_of(layer)):
                return None
            return known[1]

    def add(self, layer: RoutedLayer, choice: Choice) -> Parameters | None:
        """Merge the weight and bias of a layer; None if they do not fit, or another choice was announced."""
        version = version_of(_tensors_of(layer))
        with self._lock:
            if version is None or choice != self._choice:
                return None
            size = layer.weight.nbytes
            self.num_bytes -= size if self._kept.pop(layer, None) is not None else 0
            if self.num_bytes + size > self.max_bytes:
                return None
            self._kept[layer], self.num_bytes = (version, merge(layer, choice)), self.num_bytes + size
            return self._kept[layer][1]


def _tensors_of(layer: RoutedLayer) -> list[Tensor | None]:
    """The tensors that the merged weight and bias of a layer depend on."""
    tensors: list[Tensor | None] = list(layer._parameters.values())
    if "weight" not in layer._parameters:  # it is computed from others, e.g. by `torch.nn.utils.prune`
        tensors += [layer.weight, cast("Tensor | None", layer.bias)]
    return tensors
