"""Routed convolutions."""

from torch import Tensor, nn

from .execution import routed_output
from .routed import RoutedLayer


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
