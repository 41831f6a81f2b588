"""Check everything that can fail before the first factor is computed: which layers, which ranks, do the experts fit."""

from __future__ import annotations

import difflib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .budget import LayerSpectra, allocate, describe_ranks
from .config import SmileConfig
from .errors import ConfigError, PlanError
from .kin import plain_kind, routed_class
from .workers import in_parallel, workers_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer that will be upscaled; the ranks are capped by its size."""

    name: str
    in_features: int
    out_features: int
    k: int
    gate_k: int
    has_bias: bool
    itemsize: int

    @property
    def work(self) -> float:
        """Floating-point operations to factor one expert's delta, about: products with a basis and among it."""
        small, large = sorted((self.in_features, self.out_features))
        basis = min(8 * self.rank, small)
        return 4.0 * large * small * basis + 8.0 * small * basis**2

    @property
    def working_bytes(self) -> int:
        """What one delta takes while it is factored: both weights, it and a scaled copy, Gram matrices, bases."""
        small, large = sorted((self.in_features, self.out_features))
        return 4 * (4 * small * large + 4 * small**2 + 4 * (small + large) * self.rank)

    @property
    def rank(self) -> int:
        """The rank that is factored."""
        return max(self.k, self.gate_k)

    def nominal(self, num_experts: int, config: SmileConfig) -> LayerSpectra:
        """What its directions cost, were all of them worth the same."""
        gates = (self.gate_k if num_experts > 1 else 0,) * num_experts
        worth = ((1.0,) * self.k,) * num_experts
        shared, scales = config.routing_use_diff, int(config.storage == "int8")
        return LayerSpectra(self.name, self.in_features, self.out_features, worth, gates, shared, 1.0, scales=scales)

    def added(self, num_experts: int) -> int:
        """Parameters that `num_experts` experts of full rank add, without biases."""
        gate_k = self.gate_k if num_experts > 1 else 0
        if self.k == -1:
            return num_experts * (self.in_features * self.out_features + gate_k * self.in_features)
        return num_experts * (max(self.k, gate_k) * self.in_features + self.k * self.out_features)


@dataclass(frozen=True)
class Plan:
    """What an upscaling will do.

    Attributes:
        layers: the linear layers to upscale, in the model's order.
        num_experts: how many experts are to come.
        tensors: name, shape of every parameter and persistent buffer of the pretrained model.
        rest: the names among them that belong to no upscaled layer.
        kept: the linear layers that stay as pretrained.
        parameters: of the pretrained model.
    """

    layers: tuple[LayerPlan, ...]
    num_experts: int
    tensors: dict[str, torch.Size]
    rest: tuple[str, ...]
    kept: tuple[str, ...]
    parameters: int

    def workers(self, device: torch.device) -> int:
        """How many deltas are factored at a time; on an accelerator one."""
        return workers_for(max(layer.working_bytes for layer in self.layers)) if device.type == "cpu" else 1

    def summary(self) -> dict[str, str]:
        """What the upscaling will cost, for people; the added parameters and bytes are upper bounds."""
        added = sum(layer.added(self.num_experts) for layer in self.layers)
        read = self.num_experts * sum(math.prod(shape) for shape in self.tensors.values()) * self.layers[0].itemsize
        result = (self.parameters + added) * self.layers[0].itemsize
        working = self.workers(torch.device("cpu")) * max(layer.working_bytes for layer in self.layers)
        return {
            "linear layers to upscale": str(len(self.layers)),
            "linear layers kept": str(len(self.kept)),
            "tensors outside the upscaled layers": str(len(self.rest)),
            "experts": str(self.num_experts),
            "ranks (gate_k, k)": f"{_span([x.gate_k for x in self.layers])}, {_span([x.k for x in self.layers])}",
            "parameters added, at most": f"{added:,}",
            "parameter ratio, at most": f"{1 + added / self.parameters:.3f}",
            "bytes to read of the experts": f"{read / 1e6:.1f} MB",
            "size of the result, at most": f"{result / 1e6:.1f} MB",
            "memory beyond both models, at most": f"{working / 1e6:.1f} MB",
        }

    def budget(self, config: SmileConfig) -> dict[str, str]:
        """What a `param_ratio` will buy, for people; nothing without one.

        Raises:
            ConfigError: if it is too little for the router rows.
        """
        if config.param_ratio is None:
            return {}
        told = {"parameters added by param_ratio, at most": f"{int(self.parameters * (config.param_ratio - 1)):,}"}
        if config.allocation != "uniform":
            return {
                **told,
                f"ranks by allocation={config.allocation}": "known when the experts are factored, and logged",
            }
        layers = [layer.nominal(self.num_experts, config) for layer in self.layers]
        ranks = allocate_within(layers, self.parameters, config)
        return {**told, **{f"ranks of {kind}": span for kind, span in describe_ranks(layers, ranks).items()}}


def allocate_within(
    layers: Sequence[LayerSpectra], parameters: int, config: SmileConfig, reserved: int = 0
) -> list[list[int]]:
    """For each layer, for each expert, the rank that `param_ratio` allows.

    Args:
        parameters: of the pretrained model.
        reserved: parameters that are needed beside the layers.

    Raises:
        ConfigError: if it is too little for the router rows.
    """
    assert config.param_ratio is not None
    try:
        return allocate(layers, int(parameters * (config.param_ratio - 1)) - reserved, config.allocation)
    except ConfigError as error:
        least = 1 + (sum(layer.fixed for layer in layers) + reserved) / parameters
        raise ConfigError(
            f"param_ratio={config.param_ratio} is too little for the router rows alone, {error}: "
            f"gate_k={config.gate_k} needs {least:.3f}; lower gate_k, or raise param_ratio"
        ) from None


def make_plan(pretrained: nn.Module, num_experts: int, config: SmileConfig) -> Plan:
    """Plan the upscaling of `pretrained` with `num_experts` experts.

    Raises:
        PlanError: no experts, no layer to upscale, or a layer whose weights are read past its ``forward``.
        ConfigError: `top_k` above the number of experts, or a rank that every layer is too small for.
    """
    if num_experts < 1:
        raise PlanError("no experts: give at least one fine-tuned model beside the pretrained one")
    if config.top_k > num_experts:
        raise ConfigError(f"top_k={config.top_k} is more than the {num_experts} experts there are")
    for name, parameter in pretrained.named_parameters():
        if not parameter.is_meta:  # otherwise it is checked when it is read
            check_finite(parameter, name, "the pretrained model")
    _check_patterns(pretrained, config)
    chosen = dict(_chosen_layers(pretrained, config))
    if not chosen:
        raise PlanError(_nothing_to_upscale(pretrained, config))
    largest = max(min(_sides(layer)) for layer in chosen.values())
    for option in ("gate_k", "k"):
        value = getattr(config, option)
        if value > largest:
            raise ConfigError(f"{option}={value} is more than any layer allows; the largest possible is {largest}")
    layers = tuple(_plan_layer(name, layer, config) for name, layer in chosen.items())
    _log_caps(layers, config)
    tensors = {name: tensor.shape for name, tensor in pretrained.state_dict().items()}
    kept = tuple(name for name, _ in _layers(pretrained, config) if name not in chosen)
    parameters = sum(parameter.numel() for parameter in pretrained.parameters())
    return Plan(layers, num_experts, tensors, _rest(pretrained, chosen), kept, parameters)


def estimated_seconds(plan: Plan, factor: Callable[[Tensor, int], tuple[Tensor, ...]], workers: int) -> float:
    """How long factoring will take: each worker tries each shape of layer on noise, the hardest case."""
    seconds: dict[tuple[int, int, int], float] = {}
    for layer in plan.layers:
        shape = (layer.out_features, layer.in_features, layer.rank)
        if shape not in seconds and layer.rank > 0:
            noise = torch.randn(shape[:2])
            began = time.perf_counter()
            list(in_parallel(lambda rank: partial(factor, noise, rank), [layer.rank] * workers, workers))  # noqa: B023
            seconds[shape] = (time.perf_counter() - began) / workers
    shapes = [(layer.out_features, layer.in_features, layer.rank) for layer in plan.layers]
    return plan.num_experts * sum(seconds.get(shape, 0.0) for shape in shapes)


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def check_expert(plan: Plan, name: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse an expert that doesn't have exactly the pretrained model's tensors.

    Raises:
        PlanError: naming the expert, the tensor, and what is wrong with it.
    """
    missing = [key for key in plan.tensors if key not in shapes]
    extra = [key for key in shapes if key not in plan.tensors]
    if missing or extra:
        parts = [f"{len(missing)} tensors missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(extra)} additional tensors (first: {extra[0]})"] if extra else []
        raise PlanError(
            f"expert {name!r} has another architecture than the pretrained model: {', '.join(parts)}; "
            "use experts that were fine-tuned from this pretrained model"
        )
    for key, shape in plan.tensors.items():
        if tuple(shapes[key]) != tuple(shape):
            raise PlanError(
                f"expert {name!r}: {key} has the shape {tuple(shapes[key])}, the pretrained model's {tuple(shape)}; "
                "use experts that were fine-tuned from this pretrained model"
            )


def check_finite(tensor: Tensor, name: str, label: str) -> None:
    """Raise PlanError, naming model and tensor, for NaN or infinity."""
    if not tensor.is_floating_point():
        return
    # one NaN or infinity spoils the sum, which is many times faster to look at; a sum may also overflow
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not torch.isfinite(total) and not torch.isfinite(tensor).all():
        kind = "NaN" if torch.isnan(tensor).any() else "infinity"
        raise PlanError(f"{label} holds {kind} in {name}; it was not saved or trained correctly")


def _layers(model: nn.Module, config: SmileConfig) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of a kind that the options allow; convolutions in groups are no single matrix."""
    for name, module in model.named_modules():
        kind = plain_kind(module)
        convolution = isinstance(module, nn.Conv2d)
        if kind and (not convolution or (config.convolutions and module.groups == 1)):
            yield name, module


def _chosen_layers(model: nn.Module, config: SmileConfig) -> Iterator[tuple[str, nn.Module]]:
    for name, module in _layers(model, config):
        targeted = config.target_modules is None or any(fnmatchcase(name, p) for p in config.target_modules)
        excluded = any(fnmatchcase(name, p) for p in config.exclude_modules)
        if not targeted or excluded:
            continue
        kind = plain_kind(module)
        if type(module).forward is not kind.forward:  # type: ignore[union-attr]
            raise PlanError(
                f"{name} is a {type(module).__name__}, which computes more than {kind.__name__} does; "  # type: ignore[union-attr]
                f"leave it out with exclude_modules=['{name}'], or start from a model with plain layers"
            )
        bypass = _bypassed_by(model, name)
        if bypass:
            raise PlanError(
                f"{bypass} reads the weights of {name} without calling the layer, so its experts would be ignored; "
                f"leave it out with exclude_modules=['{name}']"
            )
        yield name, module


def _check_patterns(model: nn.Module, config: SmileConfig) -> None:
    known = [name for name, _ in _layers(model, config)]
    for pattern in (*(config.target_modules or ()), *config.exclude_modules):
        if not any(fnmatchcase(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
            hint = f"; a linear layer is called {near[0]}" if near else ""
            raise ConfigError(f"the module pattern {pattern!r} matches no linear layer of this model{hint}")


def _bypassed_by(model: nn.Module, name: str) -> str | None:
    """The torch module around a linear layer that reads its weight itself (their fused attention paths do)."""
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            return f"torch.nn.{type(parent).__name__}"
    return None


def _nothing_to_upscale(model: nn.Module, config: SmileConfig) -> str:
    count = len(list(_layers(model, config)))
    if count:
        return f"target_modules and exclude_modules leave none of the {count} linear layers of {type(model).__name__}"
    some = any(isinstance(module, nn.Conv2d) for module in model.modules())
    hint = "; convolutions=true upscales its convolutions" if some and not config.convolutions else ""
    return f"{type(model).__name__} has no linear layer to upscale{hint}"


def _sides(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix."""
    out, columns = routed_class(layer).matrix(cast(Tensor, layer.weight)).shape
    return out, columns


def _plan_layer(name: str, layer: nn.Module, config: SmileConfig) -> LayerPlan:
    out, columns = _sides(layer)
    largest = min(out, columns)
    return LayerPlan(
        name, columns, out, min(config.k, largest), min(config.gate_k, largest),
        layer.bias is not None, cast(Tensor, layer.weight).element_size(),
    )  # fmt: skip


def _log_caps(layers: tuple[LayerPlan, ...], config: SmileConfig) -> None:
    for option in ("gate_k", "k"):
        capped = [layer for layer in layers if getattr(layer, option) < getattr(config, option)]
        if capped:
            log.info(
                "%s=%d is capped in %d of %d layers by their size, first in %s (%d)",
                option, getattr(config, option), len(capped), len(layers), capped[0].name, getattr(capped[0], option),
            )  # fmt: skip


def _rest(model: nn.Module, chosen: dict[str, nn.Module]) -> tuple[str, ...]:
    """State-dict names of the tensors in no upscaled layer, also not by being tied to one."""
    inside: set[int] = {id(p) for layer in chosen.values() for p in layer.parameters()}
    tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    return tuple(name for name, tensor in tensors.items() if id(tensor) not in inside)
