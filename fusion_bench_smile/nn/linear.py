"""Routed linear layers: `torch.nn.Linear` and the `Conv1D` of transformers."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import SmileConfig
from .layout import ExpertLayout
from .routed import DEFAULT_CONFIG, RoutedLayer


class SmileLinear(RoutedLayer, nn.Linear):
    """A routed `torch.nn.Linear` with its arguments, the layout of the experts and the model's options.

    See `RoutedLayer`.
    """

    plain_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: ExpertLayout,
        config: SmileConfig = DEFAULT_CONFIG,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.add_experts(layout, config)


class SmileConv1D(RoutedLayer, Conv1D):  # type: ignore[misc]  # both declare `weight`
    """A routed transformers `Conv1D` (GPT-2's linear layer, with a weight of shape (in, out)); see `RoutedLayer`."""

    plain_type = Conv1D

    @staticmethod
    def weight_matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix (out, in): a view."""
        return weight.mT

    def plain_output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of a `Conv1D`, which always has a bias: (…, out)."""
        assert bias is not None
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
