"""The routed layer: a plain layer with a router and low-rank experts beside its parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import SmileConfig
from .execution import routed_output
from .layout import ExpertLayout, is_uniform
from .quantization import ROW_TENSORS, dequantized, stored_rows
from .scoring import select_experts
from .sparsity import num_kept, restore

if TYPE_CHECKING:
    from .input_router import InputRouter

EXPERT_TENSORS = (*ROW_TENSORS, *(f"{name}_scale" for name in ROW_TENSORS), "expert_bias")
DEFAULT_CONFIG = SmileConfig()


class RoutingEvent(NamedTuple):
    """What a router decided in one call of a layer."""

    inputs: Tensor  # of the layer, (…, in)
    scores: Tensor  # (…, T), float32 or float64; (B, T) where experts are chosen for whole inputs
    experts: Tensor  # the indices of the experts that serve each token or input, (…, top_k)
    weights: Tensor  # their weights, (…, top_k)


RoutingHook = Callable[[RoutingEvent], None]


class RoutedLayer(nn.Module):
    """y = W₀x + b₀ + Σᵢ wᵢ(x)·(ΔWᵢ x + Δbᵢ), with the weights wᵢ of the router (arXiv 2408.10174, section 4).

    A routed layer is a plain layer of its kind, with the same settings and the same `weight` and `bias` under their old
    names. The experts' parameters are stored beside them, expert after expert, each only where it is not empty:

    - `gate` (Σ gate_ranks, in): the router rows; with a shared router the leading right singular vectors;
    - `down` (Σ down_ranks, in): the right singular vectors that are not router rows;
    - `up` (Σ ranks, out): the left singular vectors times the singular values, one a row;
    - `dense` (number of dense experts, out, in): dense deltas, with a density (number, kept) as in `sparsity`;
    - `expert_bias` (T, out): bias deltas.

    With ``storage="int8"`` or ``"int4"`` the first four hold integers, and their scales are parameters such as
    `gate_scale`; see `quantization`. `rows` returns dequantized rows. out and in are the sides of `weight_matrix`.
    """

    plain_type: ClassVar[type[nn.Module]]  # the type of layer that the class routes
    can_group_tokens: ClassVar[bool] = True  # tokens can be gathered and computed alone
    layout: ExpertLayout
    smile_config: SmileConfig  # the options of the model, one object for all its layers
    weight: Tensor
    gate: Tensor | None
    down: Tensor | None
    up: Tensor | None
    dense: Tensor | None
    expert_bias: Tensor | None
    input_router: InputRouter | None = None  # the router for whole inputs, or None where each token is routed

    @classmethod
    def from_layer(
        cls, plain: nn.Module, layout: ExpertLayout, config: SmileConfig, device: torch.device | str | None = None
    ) -> RoutedLayer:
        """A routed layer that shares the parameters and settings of `plain`; the experts are zero.

        Their parameters are created on `device`, or on the device of `plain`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update({key: copy(value) for key, value in plain.__dict__.items()})
        layer.add_experts(layout, config, device)
        return layer

    def to_plain_layer(self) -> nn.Module:
        """The plain layer, which shares this layer's parameters and settings."""
        layer = self.plain_type.__new__(self.plain_type)
        nn.Module.__init__(layer)
        added = ("layout", "smile_config", "input_router", "_routing_hooks")
        layer.__dict__.update({key: copy(value) for key, value in self.__dict__.items() if key not in added})
        for name in EXPERT_TENSORS:
            layer._parameters.pop(name)
        return layer

    def add_experts(self, layout: ExpertLayout, config: SmileConfig, device: torch.device | str | None = None) -> None:
        """Register the experts' parameters, all zero."""
        self.layout, self.smile_config = layout, config
        self._routing_hooks: OrderedDict[int, RoutingHook] = OrderedDict()
        out_features = len(self.weight_matrix(self.weight))
        sizes = {name: sum(rows) for name, rows in layout.rows.items()}
        row_shapes = self._row_shapes()
        shapes = {name: (size, *row_shapes[name]) for name, size in sizes.items()}
        shapes["expert_bias"] = (layout.num_experts if layout.expert_bias else 0, out_features)
        device, dtype = device or self.weight.device, self.weight.dtype
        for name, shape in shapes.items():
            stored = stored_rows(shape, config.storage if name in ROW_TENSORS else "same", dtype)
            self._register_zeros(name, *stored["values"], device)
            if name in ROW_TENSORS:
                self._register_zeros(f"{name}_scale", *stored.get("scales", ((0,), dtype)), device)
        self.set_config(config)

    def set_config(self, config: SmileConfig) -> None:
        """Take the options of the model.

        Gradients reach the router rows that are directions of an expert, and others through the weights of several
        experts. Where they reach none, the rows require no gradient: `DistributedDataParallel` would wait for it.
        """
        self.smile_config = config
        reached = any(self.layout.shared_ranks) or (config.top_k > 1 and config.routing_scope == "token")
        for rows in (self._parameters["gate"], self._parameters["gate_scale"]):
            if rows is not None and rows.is_floating_point():
                rows.requires_grad_(self.weight.requires_grad and reached)

    def _register_zeros(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        zeros = None if 0 in shape else torch.zeros(shape, device=device, dtype=dtype)
        self.register_parameter(name, None if zeros is None else nn.Parameter(zeros, dtype.is_floating_point))

    def _row_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of a row of `gate`, `down`, `up` and `dense`."""
        shape, density = self.weight_matrix(self.weight).shape, self.smile_config.density
        dense = tuple(shape) if density is None else (num_kept(shape.numel(), density),)
        return {"gate": shape[1:], "down": shape[1:], "up": shape[:1], "dense": dense}

    def rows(self, name: str, expert: int | None = None) -> Tensor | None:
        """The rows of `gate`, `down`, `up` or `dense` (n, out, in), of all experts or of one; None for no rows.

        They are dequantized, and dropped entries are zero.
        """
        rows = self.kept_rows(name, expert)
        if rows is None or name != "dense" or self.smile_config.density is None:
            return rows
        out_features, in_features = self.weight_matrix(self.weight).shape
        return restore(rows, (out_features, in_features))

    def kept_rows(self, name: str, expert: int | None = None) -> Tensor | None:
        """The same without dropped entries: those of `dense` with a density are (n, kept)."""
        stored: Tensor | None = getattr(self, name)
        sizes = self.layout.rows[name]
        if stored is None or (expert is not None and not sizes[expert]):
            return None
        part = slice(None) if expert is None else slice(sum(sizes[:expert]), sum(sizes[: expert + 1]))
        rows, scales = stored if expert is None else stored[part], getattr(self, f"{name}_scale")
        if scales is None:
            return rows
        return dequantized(rows, scales[part], self._row_shapes()[name][-1], self.weight.dtype)

    def dequantize(self) -> None:
        """Store the factors in the dtype of the weight."""
        for name in ROW_TENSORS:
            if getattr(self, f"{name}_scale") is not None:
                rows = self.kept_rows(name)
                assert rows is not None
                self._parameters[name] = nn.Parameter(rows.detach(), requires_grad=False)
                self._parameters[f"{name}_scale"] = None

    def directions(self, expert: int) -> Tensor | None:
        """The right singular vectors of one expert: (rank, in); None if it has none."""
        shared = self.layout.shared_ranks[expert]
        gate = self.rows("gate", expert) if shared else None
        down = self.rows("down", expert)
        if gate is None or down is None:
            return down if gate is None else gate[:shared]
        return torch.cat([gate[:shared], down])

    @staticmethod
    def weight_matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix (out, in): a view."""
        return weight

    def plain_output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of a plain layer with these settings and another weight and bias: (…, out)."""
        return F.linear(x, weight, bias)

    def project(self, x: Tensor, rows: Tensor) -> Tensor:
        """The product of every token of x with rows (r, in): (…, r)."""
        return F.linear(x, rows)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return routed_output(self, x)

    def register_routing_hook(self, hook: RoutingHook) -> RemovableHandle:
        """Have the router call ``hook(event)`` with a `RoutingEvent` in every call of the layer."""
        handle = RemovableHandle(self._routing_hooks)
        self._routing_hooks[handle.id] = hook
        return handle

    def call_routing_hooks(self, x: Tensor, scores: Tensor) -> None:
        """Report scores (…, T) to the routing hooks; without any it costs nothing."""
        if self._routing_hooks:
            scores = scores.detach()
            event = RoutingEvent(x.detach(), scores, *select_experts(scores, self.smile_config.top_k))
            for hook in list(self._routing_hooks.values()):
                hook(event)

    def extra_repr(self) -> str:
        """The settings of the plain layer and the ranks of the experts."""
        layout = self.layout
        return (
            f"{super().extra_repr()}, experts={layout.num_experts}, top_k={self.smile_config.top_k}, "
            f"ranks={_short(layout.ranks)}, gate_ranks={_short(layout.gate_ranks)}"
        )


def _short(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if is_uniform(ranks) else str(list(ranks))


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of a model; tied ones count once, and values that share a byte count each."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for layer in routed_layers(model).values():
        for name, shape in layer._row_shapes().items():
            stored = layer._parameters[name]
            if stored is not None and stored.dtype == torch.uint8:
                counts[id(stored)] = stored.numel() // stored.shape[-1] * shape[-1]
    return sum(counts.values())


def count_bytes(model: nn.Module) -> int:
    """The size in bytes of a model's parameters as stored; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Name → routed layer, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}


def layers_with_router(model: nn.Module) -> dict[str, RoutedLayer]:
    """Name → routed layer that scores its inputs."""
    return {name: layer for name, layer in routed_layers(model).items() if layer.gate is not None}
