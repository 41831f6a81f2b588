"""The state of one call of a model: what a router for whole inputs knows about its inputs so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .execution import InputGroups

if TYPE_CHECKING:
    from .routed import RoutedLayer

MIN_ENERGY_SHARE = 1e-12  # below it the logarithm of a share of energy is cut off


@dataclass
class RoutingState:
    """What a router knows while a batch of B inputs passes the model. T is the number of experts."""

    num_inputs: int = 0  # B; 0 before the first call
    mask: Tensor | None = None  # (B, tokens), bool, the tokens that are not padding; None without attention_mask
    depth: int = 0  # of nested calls of entry points
    in_first_pass: bool = False  # the pretrained model alone processes the inputs, and its layers are scored
    collects_features: bool = False  # the first pass collects features for prototypes instead of scores
    scores: Tensor | None = None  # that the choice rests on, (B, T)
    choice: Tensor | None = None  # the weight of each expert for each input in all layers, (B, T)
    score_sum: Tensor | None = None  # over the layers so far, (B, T)
    num_layers: int = 0  # in score_sum
    features: list[Tensor] = field(default_factory=list)  # (B, 2·T) for each layer so far
    layer_weights: dict[RoutedLayer, Tensor] = field(default_factory=dict)  # (B, T), of scopes that choose by layer
    groups: InputGroups | None = None  # the inputs by expert, for a choice that holds in all layers

    @classmethod
    def of_call(cls, arguments: Mapping[str, Any], collects_features: bool) -> RoutingState:
        """The state at the begin of a call with these keyword arguments."""
        num_inputs = next(len(value) for value in arguments.values() if isinstance(value, Tensor) and value.ndim)
        mask = arguments.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return cls(num_inputs=num_inputs, mask=mask, collects_features=collects_features)

    @property
    def input_features(self) -> Tensor:
        """The features of the inputs, of all layers so far: (B, 2·T·layers)."""
        return torch.cat(self.features, dim=-1)

    def add_scores(self, scores: Tensor, is_energy_score: bool) -> Tensor:
        """Add the scores (B, T) of a layer, and return those of all layers so far, (B, T).

        Logarithms of shares of energy are summed, as of independent observations; other scores are averaged.
        """
        self.score_sum = scores if self.score_sum is None else self.score_sum + scores
        self.num_layers += 1
        return self.score_sum if is_energy_score else self.score_sum / self.num_layers

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """The mean over the tokens of each input, padding excluded: (…, n) → (B, n)."""
        return mean_over_tokens(values, self.num_inputs, self.mask)


def mean_over_tokens(values: Tensor, num_inputs: int, mask: Tensor | None) -> Tensor:
    """The mean of values (rows, …, n) over the tokens of each input: (num_inputs, n).

    Args:
        values: rows is a multiple of `num_inputs`, with the beams of an input next to each other.
        num_inputs: The number of inputs.
        mask: (num_inputs, tokens), bool: the tokens that count. None counts all.

    Raises:
        RuntimeError: rows is no multiple of `num_inputs`.
    """
    rows = len(values)
    if rows % num_inputs:
        raise RuntimeError(f"leading dimension {rows} is not a multiple of the batch size {num_inputs}")
    values = values.reshape(rows, -1, values.shape[-1])
    if mask is not None and values.shape[1] == 1 and rows == mask.numel():  # tokens of all inputs in one dimension
        values = values.reshape(num_inputs, -1, values.shape[-1])
    if mask is None or mask.shape[1] != values.shape[1]:
        means = values.mean(dim=1)
    else:
        counted = repeat_for_rows(mask, len(values)).to(values.device, values.dtype)[..., None]
        means = (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return means.reshape(num_inputs, -1, means.shape[-1]).mean(dim=1)  # over the beams of an input


def repeat_for_rows(values: Tensor, rows: int) -> Tensor:
    """Values (B, …) of B inputs, repeated for the beams of each input: (rows, …).

    Raises RuntimeError if rows is not a multiple of B.
    """
    if rows % len(values):
        raise RuntimeError(f"leading dimension {rows} is not a multiple of the batch size {len(values)}")
    return values if rows == len(values) else values.repeat_interleave(rows // len(values), dim=0)


def log_energy_share(shares: Tensor) -> Tensor:
    """The logarithm of shares of energy, bounded below."""
    return torch.log(shares.clamp(min=MIN_ENERGY_SHARE))
