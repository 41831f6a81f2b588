"""The plan: which layers are upscaled, to which ranks. Whatever can fail is checked before the first factorization."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..config import SmileConfig, Storage
from ..exceptions import ConfigError, PlanError
from ..nn import DENSE, RoutedLayer, count_bytes, count_parameters, routed_type_of, row_size
from ..nn.compatibility import wrapped_weight
from ..nn.sparsity import num_kept
from .bounds import ExpertBounds
from .layer_selection import candidate_layers, select_layers
from .parallel import map_in_parallel, num_workers
from .rank_allocation import LayerSpectra, allocate

log = logging.getLogger(__name__)

LEAST_CLASS = 32  # the least rank that is factored


@dataclass(frozen=True)
class LayerPlan:
    """One layer to upscale. Its ranks are limited by its size."""

    name: str  # the layer's name in the model
    in_features: int  # columns of its weight as a matrix
    out_features: int  # rows of its weight as a matrix
    k: int  # rank of the experts; −1 for dense deltas
    gate_k: int  # rank of the router
    has_bias: bool  # the layer has a bias
    dtype: torch.dtype  # of its weight
    routed_type: type[RoutedLayer]  # the type of the routed layer
    shared_router: bool = True  # the router's rows are the leading directions of the experts
    density: float | None = None  # the share of a dense delta's entries that is kept
    storage: Storage = "same"  # of the factors

    @property
    def rank(self) -> int:
        """The rank of the factorization."""
        return self.rank_class(max(self.k, self.gate_k))

    def rank_class(self, rank: int) -> int:
        """The rank to factor at where `rank` is needed: the next of 32, 64, 128, …, limited by the size of the layer.

        All ranks of a class have the same directions, bit for bit: a sweep over them factors once.
        """
        return min(max(LEAST_CLASS, 2 ** (rank - 1).bit_length()), self.in_features, self.out_features)

    @property
    def work(self) -> float:
        """Floating-point operations to factor one delta, approximately: products with a basis and within it."""
        small, large = sorted((self.in_features, self.out_features))
        basis = min(8 * self.rank, small)
        return 4.0 * large * small * basis + 8.0 * small * basis**2

    @property
    def working_bytes(self) -> int:
        """Memory while one delta is factored: both weights, the delta and a scaled copy, Gram matrices, bases."""
        small, large = sorted((self.in_features, self.out_features))
        return 4 * (4 * small * large + 4 * small**2 + 4 * (small + large) * self.rank)

    def spectra(
        self, energies: Sequence[Sequence[float]], gate_ranks: Sequence[int], num_biases: int, config: SmileConfig
    ) -> LayerSpectra:
        """The spectra of the experts, with what a row costs in the unit of the budget: parameters or bytes."""

        def cost(size: int) -> int:
            return row_size(size, config.storage, self.dtype, in_bytes=config.byte_ratio is not None)

        biases = num_biases * (self.dtype.itemsize if config.byte_ratio is not None else 1)
        return LayerSpectra(
            self.name, tuple(map(tuple, energies)), tuple(gate_ranks), config.routing_use_diff,
            cost(self.out_features), cost(self.in_features), biases,
        )  # fmt: skip

    def least_spectra(self, num_experts: int, config: SmileConfig) -> LayerSpectra:
        """The spectra of experts with the router rows alone."""
        gate_k = self.gate_k if num_experts > 1 else 0
        return self.spectra([[1.0] * gate_k] * num_experts, [gate_k] * num_experts, 0, config)

    def max_added(self, ranks: Sequence[int | None], in_bytes: bool = False) -> int:
        """Parameters or bytes that experts add, without biases, with deltas of these ranks; None for full rank."""
        with_router = len(ranks) > 1
        return 0 if all(rank == 0 for rank in ranks) else sum(self._added(r, with_router, in_bytes) for r in ranks)

    def _added(self, rank: int | None, with_router: bool, in_bytes: bool) -> int:
        """What one expert adds. A delta that is read as a matrix may have more directions than the adapter."""

        def cost(size: int) -> int:
            return row_size(size, self.storage, self.dtype, in_bytes=True) if in_bytes else size

        if rank and not self.reads_factors:
            rank = None
        limit = min(self.in_features, self.out_features) if rank is None else rank
        gate_k = self.gate_k if with_router else 0
        gate_rank = min(gate_k, limit) if self.shared_router else gate_k
        if self.k == DENSE:
            dense = self.out_features * cost(self.in_features)
            if self.density is not None:
                dense = cost(num_kept(self.out_features * self.in_features, self.density))
            return dense * int(limit > 0) + gate_rank * cost(self.in_features)
        k = min(self.k, limit)
        down = max(k, gate_rank) if self.shared_router else k + gate_rank
        return down * cost(self.in_features) + k * cost(self.out_features)

    @property
    def reads_factors(self) -> bool:
        """The deltas of LoRA experts are read as factors."""
        return self.k != DENSE and self.shared_router


@dataclass(frozen=True)
class Plan:
    """The plan of an upscaling."""

    layers: tuple[LayerPlan, ...]  # the layers to upscale, in the model's order
    num_experts: int
    tensors: dict[str, torch.Size]  # name → shape of every parameter and persistent buffer of the pretrained model
    other_tensors: tuple[str, ...]  # names of those that belong to no upscaled layer, also not by being tied to one
    tied_tensors: dict[str, str]  # name under which another module holds a tensor of an upscaled layer → that layer
    recurrent_tensors: frozenset[str]  # names of those of recurrent layers
    block_tensors: frozenset[str]  # names of those inside lists of modules, which an expert must have in the same shape
    kept_layers: tuple[str, ...]  # the linear layers that stay as pretrained
    parameters: int  # the number of parameters of the pretrained model
    bytes: int  # their size
    has_budget: bool = False  # the ranks are allocated within a `param_ratio` or `byte_ratio`
    experts: tuple[ExpertBounds, ...] = ()  # what is known of each expert before it is read; empty if nothing is

    def max_ranks(self, layer: LayerPlan) -> list[int | None]:
        """The rank of each expert's delta in a layer; None where it is unknown."""
        return [bounds.ranks.get(layer.name) for bounds in self.experts or [ExpertBounds()] * self.num_experts]

    @property
    def is_exact(self) -> bool:
        """The ranks of all deltas are known, those that LoRA adapters declare."""
        known = (layer.reads_factors and None not in self.max_ranks(layer) for layer in self.layers)
        return not self.has_budget and all(known)

    @property
    def max_added_parameters(self) -> int:
        """Parameters that the experts add, biases included, scales of quantized factors not."""
        return sum(layer.max_added(self.max_ranks(layer)) + self._biases(layer) for layer in self.layers)

    @property
    def max_added_bytes(self) -> int:
        """Bytes that the experts add, biases and scales included."""
        return sum(
            layer.max_added(self.max_ranks(layer), in_bytes=True) + self._biases(layer) * layer.dtype.itemsize
            for layer in self.layers
        )

    def _biases(self, layer: LayerPlan) -> int:
        changed = not self.experts or any(layer.name not in bounds.kept_biases for bounds in self.experts)
        return self.num_experts * layer.out_features if layer.has_bias and changed else 0

    def num_workers(self, device: torch.device) -> int:
        """The number of deltas that are factored at a time; one on an accelerator."""
        return num_workers(max(layer.working_bytes for layer in self.layers)) if device.type == "cpu" else 1

    def summary(self) -> dict[str, str]:
        """The cost of the upscaling as text. Added parameters are an upper bound, unless all ranks are known."""
        added, bound = self.max_added_parameters, "" if self.is_exact else ", at most"
        whole = sum(math.prod(shape) for shape in self.tensors.values()) * self.layers[0].dtype.itemsize
        sizes = [bounds.nbytes for bounds in self.experts] or [None] * self.num_experts
        read = sum(whole if size is None else size for size in sizes)
        result = self.bytes + self.max_added_bytes
        working = self.num_workers(torch.device("cpu")) * max(layer.working_bytes for layer in self.layers)
        return {
            "linear layers to upscale": str(len(self.layers)),
            "linear layers kept": str(len(self.kept_layers)),
            "tensors outside the upscaled layers": str(len(self.other_tensors)),
            "experts": str(self.num_experts),
            "ranks (gate_k, k)": f"{_range([x.gate_k for x in self.layers])}, {_range([x.k for x in self.layers])}",
            f"parameters added{bound}": f"{added:,}",
            f"parameter ratio{bound}": f"{1 + added / self.parameters:.3f}",
            "bytes to read of the experts": f"{read / 1e6:.1f} MB",
            f"size of the result{bound}": f"{result / 1e6:.1f} MB",
            "memory beyond both models, at most": f"{working / 1e6:.1f} MB",
        }

    def budget(self, config: SmileConfig) -> int:
        """What `param_ratio` or `byte_ratio` allows beside the pretrained model: parameters, or bytes."""
        name, _, whole = self.budget_unit(config)
        return int(whole * (getattr(config, name) - 1))

    def budget_unit(self, config: SmileConfig) -> tuple[str, str, int]:
        """The option of a budget, its unit, and the size of the pretrained model in this unit."""
        if config.byte_ratio is not None:
            return "byte_ratio", "bytes", self.bytes
        return "param_ratio", "parameters", self.parameters

    def budget_summary(self, config: SmileConfig) -> dict[str, str]:
        """A budget as text; empty without one. Raises ConfigError if it is too small for the router rows."""
        if not config.has_budget:
            return {}
        allocate_ranks(self, [layer.least_spectra(self.num_experts, config) for layer in self.layers], config)
        name, unit, _ = self.budget_unit(config)
        return {
            f"{unit} added by {name}, at most": f"{self.budget(config):,}",
            "ranks": "known when the experts are factored, and logged",
        }


def allocate_ranks(
    plan: Plan, layers: Sequence[LayerSpectra], config: SmileConfig, reserved: int = 0
) -> list[list[int]]:  # fmt: skip
    """The rank of each expert in each layer within the budget of a plan.

    The budget is smaller by the `reserved` parameters in float32, which are needed outside the layers. Raises
    ConfigError if it is too small for the router rows.
    """
    reserved *= torch.float32.itemsize if config.byte_ratio is not None else 1
    try:
        return allocate(layers, plan.budget(config) - reserved)
    except ConfigError as error:
        name, unit, whole = plan.budget_unit(config)
        required = math.ceil(1000 + 1000 * (sum(layer.min_cost for layer in layers) + reserved) / whole) / 1000
        raise ConfigError(
            f"{name}={getattr(config, name)} is too little for the router rows alone, {error} {unit}: "
            f"gate_k={config.gate_k} needs {required:.3f}; lower gate_k, or raise {name}"
        ) from None


def make_plan(pretrained: nn.Module, num_experts: int, config: SmileConfig) -> Plan:
    """Plan the upscaling of a pretrained model.

    Raises:
        PlanError: There are no experts or no layers to upscale, a weight is not finite, or routing can't serve the
            model or a layer; see `select_layers`.
        ConfigError: `top_k` is above the number of experts, a rank is too large for every layer, or a module pattern
            matches nothing.
    """
    if num_experts < 1:
        raise PlanError("no experts: give at least one fine-tuned model beside the pretrained one")
    if config.top_k > num_experts:
        raise ConfigError(f"top_k={config.top_k} is more than the {num_experts} experts there are")
    if problem := wrapped_weight(pretrained):
        raise PlanError(f"{problem}, whose delta can't be computed: upscale the model first, and quantize it then")
    for name, parameter in pretrained.named_parameters():
        if not parameter.is_meta:  # otherwise it is checked when it is read
            check_finite(parameter, name, "the pretrained model")
    candidates = candidate_layers(pretrained, config)
    selected = select_layers(pretrained, candidates, config)
    layers = tuple(_plan_layer(name, layer, config) for name, layer in selected.items())
    _check_ranks(layers, config, num_experts)
    inside = {id(p): name for name, layer in selected.items() for p in layer.parameters()}
    tensors: dict[str, Tensor] = dict(pretrained.state_dict(keep_vars=True))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    others = tuple(name for name, tensor in tensors.items() if id(tensor) not in inside)
    outside = _names_outside(pretrained, list(selected))
    tied = {name: inside[id(tensor)] for name, tensor in tensors.items() if id(tensor) in inside and name in outside}
    kept = tuple(name for name in candidates if name not in selected)
    recurrent, blocks = _recurrent_tensors(pretrained), _block_tensors(pretrained)
    return Plan(
        layers, num_experts, shapes, others, tied, recurrent, blocks, kept, count_parameters(pretrained),
        count_bytes(pretrained), config.has_budget,
    )  # fmt: skip


def estimate_seconds(
    plan: Plan, factor: Callable[[Tensor, int], object], factor_pair: Callable[[Tensor, Tensor], object], workers: int
) -> float:  # fmt: skip
    """The seconds to factor all deltas by `factor(matrix, rank)`: each worker factors noise, the hardest case.

    The deltas of LoRA experts are factored by `factor_pair(b, a)`, one after the other.
    """
    counts: Counter[tuple[int, int, int, bool]] = Counter()  # rows, columns, rank, whether it is read as factors
    for layer in plan.layers:
        for rank in plan.max_ranks(layer):
            pair = rank is not None and layer.reads_factors
            used = rank if rank is not None and pair else layer.rank
            counts[layer.out_features, layer.in_features, used, pair] += rank != 0
    return sum(
        count * (_seconds_of_pair(shape, factor_pair) if shape[3] else _seconds_of_matrix(shape, factor, workers))
        for shape, count in counts.items() if count and shape[2]
    )  # fmt: skip


def _seconds_of_pair(shape: tuple[int, int, int, bool], factor_pair: Callable[[Tensor, Tensor], object]) -> float:
    rows, columns, rank, _ = shape
    began = time.perf_counter()
    factor_pair(torch.randn(rows, rank), torch.randn(rank, columns))
    return time.perf_counter() - began


def _seconds_of_matrix(
    shape: tuple[int, int, int, bool], factor: Callable[[Tensor, int], object], workers: int
) -> float:  # fmt: skip
    noise, began = torch.randn(shape[:2]), time.perf_counter()
    list(map_in_parallel(lambda rank: partial(factor, noise, rank), [shape[2]] * workers, workers))
    return (time.perf_counter() - began) / workers


def resizable_tensors(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The tensors of an expert that differ from the pretrained model's in their number of rows alone.

    These are embeddings and heads of another vocabulary, or of other classes. A tensor inside a list of modules, such
    as the blocks of a transformer, is none of them; a vector is one beside a matrix that is resized in the same way.
    """
    pairs = {name: (tuple(shapes[name]), tuple(shape)) for name, shape in plan.tensors.items() if name in shapes}
    differ = {name: pair for name, pair in pairs.items() if pair[0][:1] != pair[1][:1] and pair[0][1:] == pair[1][1:]}
    outside = {name: pair for name, pair in differ.items() if all(pair) and name not in plan.block_tensors}
    rows = {(own[0], other[0]) for own, other in outside.values() if len(own) > 1}
    return [name for name, (own, other) in outside.items() if (own[0], other[0]) in rows or len(own) > 1]


def check_expert(
    plan: Plan, name: str, shapes: Mapping[str, Sequence[int]], resized: Collection[str] = ()
) -> None:  # fmt: skip
    """Raise PlanError, which names the difference, unless an expert has exactly the pretrained model's tensors.

    The shapes of `resized` tensors may differ.
    """
    missing = [key for key in plan.tensors if key not in shapes]
    extra = [key for key in shapes if key not in plan.tensors]
    parts = [f"{len(missing)} tensors missing (first: {missing[0]})"] if missing else []
    parts += [f"{len(extra)} additional tensors (first: {extra[0]})"] if extra else []
    problem = f" has another architecture than the pretrained model: {', '.join(parts)}" if parts else ""
    for key, shape in plan.tensors.items():
        if not problem and key not in resized and tuple(shapes[key]) != tuple(shape):
            problem = f": {key} has the shape {tuple(shapes[key])}, the pretrained model's {tuple(shape)}"
    if problem:
        raise PlanError(f"expert {name!r}{problem}; use experts that were fine-tuned from this pretrained model")


def check_finite(tensor: Tensor, name: str, label: str) -> None:
    """Raise PlanError if a tensor, called `name` in the model `label`, holds NaN or infinity."""
    if not _is_finite(tensor):
        kind = "NaN" if torch.isnan(tensor).any() else "infinity"
        raise PlanError(f"{label} holds {kind} in {name}; it was not saved or trained correctly")


def check_range(tensor: Tensor, subject: str) -> Tensor:
    """Return a tensor that was computed from finite ones; PlanError if it left the range of its dtype."""
    if not _is_finite(tensor):
        hint = "load the models in bfloat16 or float32"
        if tensor.dtype != torch.float16:  # bfloat16 has the range of float32
            hint = "check how these weights were trained and saved, or load the models in float64"
        raise PlanError(f"{subject} is outside the range of {str(tensor.dtype).removeprefix('torch.')}; {hint}")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # the sum is many times faster to check; one NaN or infinity spoils it, and it may also overflow
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _names_outside(model: nn.Module, layers: Sequence[str]) -> set[str]:
    """The names of the parameters of all modules but some layers, and the modules around them.

    The latter hold a parameter of a layer without using it: BERT's prediction head has the bias of its decoder.
    """
    paths = [name.split(".") for name in layers]
    around = {model.get_submodule(".".join(path[:depth])) for path in paths for depth in range(len(path) + 1)}
    outside = ((name, module) for name, module in model.named_modules(remove_duplicate=False) if module not in around)
    return {f"{name}.{parameter}" for name, module in outside for parameter in module._parameters}


def _recurrent_tensors(model: nn.Module) -> frozenset[str]:
    modules = model.named_modules(remove_duplicate=False)
    recurrent = {name: module for name, module in modules if isinstance(module, (nn.RNNBase, nn.RNNCellBase))}
    return frozenset(f"{name}.{parameter}" for name, module in recurrent.items() for parameter in module._parameters)


def _block_tensors(model: nn.Module) -> frozenset[str]:
    modules = model.named_modules(remove_duplicate=False)
    lists = tuple(f"{name}." for name, module in modules if isinstance(module, nn.ModuleList))
    return frozenset(name for name in model.state_dict(keep_vars=True) if name.startswith(lists))


def _plan_layer(name: str, layer: nn.Module, config: SmileConfig) -> LayerPlan:
    routed_type, weight = routed_type_of(layer), cast(Tensor, layer.weight)
    out_features, in_features = routed_type.weight_matrix(weight).shape
    k, gate_k = (min(rank, out_features, in_features) for rank in (config.k, config.router_rank))
    has_bias = layer.bias is not None
    return LayerPlan(
        name, in_features, out_features, k, gate_k, has_bias, weight.dtype, routed_type,
        config.routing_use_diff, config.density, config.storage,
    )  # fmt: skip


def _check_ranks(layers: Sequence[LayerPlan], config: SmileConfig, num_experts: int) -> None:
    """Refuse a rank that is too large for every layer, and log one that is too large for some."""
    blind = [layer for layer in layers if layer.gate_k == layer.in_features and num_experts > 1]
    if blind:
        log.warning(
            "a router of rank %d spans all inputs of %d of %d layers; all experts score the same there (first: %s, "
            "with %d inputs): lower gate_k, or leave them out with exclude_modules",
            config.router_rank, len(blind), len(layers), blind[0].name, blind[0].in_features,
        )  # fmt: skip
    ranks = {"gate_k": config.router_rank, "k": config.k} if config.gate_k is not None else {"k": config.k}
    largest = max(min(layer.in_features, layer.out_features) for layer in layers)
    for option, rank in ranks.items():
        if rank > largest:
            raise ConfigError(f"{option}={rank} is more than any layer allows; the largest possible is {largest}")
    for option, rank in ranks.items():
        limited = [layer for layer in layers if getattr(layer, option) < rank]
        if limited:
            log.info(
                "%s=%d is limited by the size of %d of %d layers, first of %s (%d)", option, rank,
                len(limited), len(layers), limited[0].name, getattr(limited[0], option),
            )  # fmt: skip


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
