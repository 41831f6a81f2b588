"""The kinds of layer that can be routed: linear ones and their kin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layers import Routed, SmileConv2d, SmileLinear


class SmileConv1D(Routed, Conv1D):  # type: ignore[misc]  # both declare `weight`
    """A routed transformers `Conv1D` (GPT-2's linear layer, whose weight is (in, out)); see `Routed`."""

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.mT

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a `Conv1D`, which always has a bias, makes of x: (…, out)."""
        assert bias is not None
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return self.route(x)


KINDS: dict[type[nn.Module], type[Routed]] = {nn.Linear: SmileLinear, Conv1D: SmileConv1D, nn.Conv2d: SmileConv2d}


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """Which of the kinds `module` is."""
    return next((plain for plain in KINDS if isinstance(module, plain)), None)


def routed_class(module: nn.Module) -> type[Routed]:
    """The routed class for a layer of one of the kinds."""
    plain = plain_kind(module)
    assert plain is not None, f"{type(module).__name__} can't be routed"
    return KINDS[plain]
