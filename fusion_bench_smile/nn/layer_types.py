"""The layer types that can be routed: `torch.nn.Linear`, `torch.nn.Conv2d`, and the `Conv1D` of transformers."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import SmileConfig
from .execution import routed_output
from .layout import ExpertLayout
from .quantization import store_tensors
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

    def resize_outputs(self, plain: nn.Linear) -> None:
        """Take weight and bias of a plain layer with another number of outputs; the experts do not change new ones."""
        sizes = plain.weight.shape[0]
        resized = {name: rows for name in ("up", "dense") if (rows := self.rows(name)) is not None}
        if self.expert_bias is not None:
            resized["expert_bias"] = self.expert_bias
        trained = {name for name, p in self._parameters.items() if p is not None and p.requires_grad}
        resized = {name: _with_columns(rows.detach(), sizes) for name, rows in resized.items()}
        self.weight, self.bias, self.out_features = plain.weight, plain.bias, sizes
        for name, value in store_tensors(resized, self.smile_config.storage).items():
            setattr(self, name, nn.Parameter(value, name in trained))


def _with_columns(rows: Tensor, columns: int) -> Tensor:
    """Rows (r, n, …) with another size of the second dimension; new entries are zero."""
    kept = rows[:, :columns]
    return torch.cat([kept, kept.new_zeros(len(rows), columns - kept.shape[1], *rows.shape[2:])], dim=1)


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
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


class SmileConv2d(RoutedLayer, nn.Conv2d):
    """A routed `torch.nn.Conv2d`: every output position is a token, routed by its patch. See `RoutedLayer`.

    A rank-k expert is a convolution to k channels followed by one of size 1.
    """

    plain_type = nn.Conv2d
    can_group_tokens = False  # patches overlap: gathering them would copy each pixel many times

    @staticmethod
    def weight_matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix (out, C·kh·kw): a view."""
        return weight.flatten(1)

    def plain_output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the convolution for x (…, C, H, W), channels last: (…, H', W', out)."""
        return self._conv_forward(x, weight, bias).movedim(-3, -1)

    def project(self, x: Tensor, rows: Tensor) -> Tensor:
        """The product of every patch of x (…, C, H, W) with rows (r, C·kh·kw): (…, H', W', r)."""
        kernel = rows.unflatten(1, self.weight.shape[1:])
        return self._conv_forward(x, kernel, None).movedim(-3, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C, H, W) to (…, out, H', W')."""
        return routed_output(self, x).movedim(-1, -3)


LAYER_TYPES: dict[type[nn.Module], type[RoutedLayer]] = {
    routed.plain_type: routed for routed in (SmileLinear, SmileConv1D, SmileConv2d)
}


def plain_type_of(module: nn.Module) -> type[nn.Module] | None:
    """The key of `LAYER_TYPES` that `module` is an instance of; None for any other module."""
    return next((plain for plain in LAYER_TYPES if isinstance(module, plain)), None)


def routed_type_of(module: nn.Module) -> type[RoutedLayer]:
    """The routed type for a layer of one of `LAYER_TYPES`."""
    plain = plain_type_of(module)
    assert plain is not None, f"{type(module).__name__} is not a layer type that can be routed"
    return LAYER_TYPES[plain]
