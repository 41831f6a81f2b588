"""Factorization: from the tensors of the experts to their factors, by the shortest path."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..exceptions import PlanError
from ..io import ExpertSource, ResizedSource, Source, StateDictSource, open_source, stored_names, tensor_digest
from ..nn import DENSE
from ..nn.quantization import largest_rounded
from ..nn.sparsity import drop
from .agreement import check_same_experts, check_same_models
from .changes import TensorChanges, check_averages, read_changes, read_finite
from .factor_cache import FactorCache, known_digest
from .layer_factors import ExpertFactors, LayerFactors
from .parallel import WorkPartition, completed, map_in_parallel
from .plan import LayerPlan, Plan, check_expert, check_finite, check_range, resizable_tensors
from .svd import Factors, low_rank_svd, truncated_svd

log = logging.getLogger(__name__)

Aliases = Mapping[str, tuple[str, ...]]  # see `stored_names`
ProgressCallback = Callable[[int, int], None]
WorkItem = tuple[LayerPlan, Source, str]  # a layer, an expert, and its name for messages


@dataclass
class Factorizer:
    """Factors the deltas of experts with one set of options."""

    config: SmileConfig
    with_router: bool  # the model has a router; with a single expert it has none
    cache: FactorCache | None = None
    workers: int = 1  # the number of deltas in progress at a time
    bytes_read: int = 0  # the size of the experts' tensors that were read so far
    _pretrained_digests: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def factorize(self, pretrained: Source, items: Iterable[WorkItem]) -> Iterator[ExpertFactors]:
        """The factors of every item, in order, several at a time. Raises PlanError if a tensor is not finite."""
        return map_in_parallel(lambda item: _Delta(self, pretrained, item).begin(), items, self.workers)

    def ranks(self, layer: LayerPlan) -> dict[str, int]:
        """What is factored, to which rank: the "delta", and the fine-tuned "weight" if the router's rows are its."""
        gate_k, shared = layer.gate_k if self.with_router else 0, self.config.routing_use_diff
        ranks = {"delta": max(layer.k, gate_k if shared else 0), "weight": 0 if shared else gate_k}
        return {kind: rank for kind, rank in ranks.items() if rank > 0}

    def count_bytes(self, tensor: Tensor) -> Tensor:
        """Count a tensor as read, and return it."""
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def pretrained_digest(self, layer: str, weight: Tensor) -> str:
        """The digest of a pretrained weight, computed once for all experts."""
        if layer not in self._pretrained_digests:
            self._pretrained_digests[layer] = tensor_digest(weight)
        return self._pretrained_digests[layer]


class _Delta:
    """The delta of one expert in one layer."""

    def __init__(self, factorizer: Factorizer, pretrained: Source, item: WorkItem) -> None:
        self.factorizer, (layer, self.expert, self.label) = factorizer, item
        self.layer, self.device, self.ranks = layer, factorizer.config.compute_device, factorizer.ranks(layer)
        self.weight_name, self.bias_name = f"{layer.name}.weight", f"{layer.name}.bias"
        self.pretrained_weight = layer.routed_type.weight_matrix(pretrained.read(self.weight_name))
        self.pretrained_bias = pretrained.read(self.bias_name) if layer.has_bias else None
        self.keys: dict[str, str] = {}  # of the entries in the factor cache
        self.cached: dict[str, Factors] = {}
        self.source_digest, self._changes = "", f"{self.label}: the change of {self.weight_name}"

    def begin(self) -> Future[ExpertFactors] | Callable[[], ExpertFactors]:
        """The factors if no large matrix has to be factored for them, otherwise a function that computes them."""
        if "weight" not in self.ranks:
            pair = self.expert.low_rank(self.weight_name) if self.layer.k != DENSE else None
            if pair is not None:
                return completed(self._from_low_rank(*pair))
            if self.expert.is_pretrained(self.weight_name):
                return completed(self._pack())
        if self.factorizer.cache is not None and self._look_up(self.factorizer.cache):
            return completed(self._pack(self.cached.get("delta"), self.cached.get("weight")))
        return self._compute

    def _look_up(self, cache: FactorCache) -> bool:
        """Take factors from the cache. False if others, or the weights, are needed."""
        start = self.factorizer.pretrained_digest(self.layer.name, self.pretrained_weight)
        identity = self.expert.identity(self.weight_name)
        end = known_digest(identity, lambda: self.factorizer.count_bytes(self._read_weight()))
        unchanged, self.source_digest = start == end, end
        content = {"delta": (start, end), "weight": (end, str(self.pretrained_weight.dtype))}
        self.keys = {
            kind: cache.key(kind, *content[kind], str(self.layer.rank_class(rank)), device=self.device)
            for kind, rank in self.ranks.items() if kind == "weight" or not unchanged
        }  # fmt: skip
        entries = {kind: cache.get(key) for kind, key in self.keys.items()}
        self.cached = {
            kind: factors.truncated(self.ranks[kind]).to(self.device)
            for kind, factors in entries.items() if factors is not None
        }  # fmt: skip
        return self.cached.keys() == self.keys.keys() and (self.layer.k != DENSE or unchanged)

    def _read_weight(self) -> Tensor:
        return self.layer.routed_type.weight_matrix(self.expert.read(self.weight_name))

    def _compute(self) -> ExpertFactors:
        fine_tuned = self._read_weight()
        if not self.source_digest:  # otherwise hashing has counted it
            self.source_digest = tensor_digest(self.factorizer.count_bytes(fine_tuned))
        check_finite(fine_tuned, self.weight_name, self.label)
        dtype = torch.promote_types(torch.promote_types(fine_tuned.dtype, self.pretrained_weight.dtype), torch.float32)
        weight, pretrained = (tensor.to(self.device, dtype) for tensor in (fine_tuned, self.pretrained_weight))
        router = self._factor("weight", weight)
        if torch.equal(weight, pretrained):
            return self._pack(router=router)
        delta = check_range(weight - pretrained, self._changes)
        return self._pack(self._factor("delta", delta), router, delta if self.layer.k == DENSE else None)

    def _from_low_rank(self, b: Tensor, a: Tensor) -> ExpertFactors:
        for tensor in (b, a):
            check_finite(self.factorizer.count_bytes(tensor), self.weight_name, self.label)
        self.source_digest = tensor_digest(b) + tensor_digest(a)
        factors = self._decompose(lambda: low_rank_svd(b.to(self.device), a.to(self.device)))
        return self._pack(factors.truncated(self.ranks["delta"]))

    def _factor(self, kind: str, matrix: Tensor) -> Factors | None:
        """The factors of a matrix to the rank that is needed, or those in the cache: the same bits."""
        if kind not in self.ranks or kind in self.cached:
            return self.cached.get(kind)
        rank, key, cache = self.ranks[kind], self.keys.get(kind), self.factorizer.cache
        factors = self._decompose(lambda: truncated_svd(matrix, self.layer.rank_class(rank)))
        if cache is not None and key is not None:
            cache.put(key, factors)
        return factors.truncated(rank)

    def _decompose(self, svd: Callable[[], Factors]) -> Factors:
        try:
            factors = svd()
        except (torch.linalg.LinAlgError, ValueError) as error:
            problem = f"{self._changes} can't be factored ({error})"
            raise PlanError(f"{problem}; check how these weights were trained and saved") from None
        for tensor in factors:
            check_range(tensor, self._changes)
        return factors

    def _pack(
        self, delta: Factors | None = None, router: Factors | None = None, dense: Tensor | None = None
    ) -> ExpertFactors:
        """The expert's factors as the layer stores them, from those of its delta and of its router."""
        k, gate_k = self.layer.k, self.layer.gate_k if self.factorizer.with_router else 0
        rank = min(k, delta.rank) if delta and dense is None else 0
        gate = router or (delta and delta.truncated(gate_k))
        gate_rank = gate.rank if gate else 0
        shared = 0 if router else min(gate_rank, rank)
        bias = self._bias_delta()
        return ExpertFactors(
            rank=rank if dense is None else DENSE, gate_rank=gate_rank,
            gate=self._stored(gate and gate.down), down=self._stored(delta and delta.down[shared:rank]),
            up=self._stored(delta and delta.up[:, :rank].mT), dense=self._stored(self._kept(dense)), bias=bias,
            energy=delta.energy(k) if delta and rank else 1.0, source_digest=self.source_digest,
            squared_norm=sum(_squared_norm(x) for x in (delta.norm if delta else dense, bias) if x is not None),
        )  # fmt: skip

    def _kept(self, dense: Tensor | None) -> Tensor | None:
        density = self.factorizer.config.density
        return dense if dense is None or density is None else drop(dense, density)

    def _stored(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        stored = tensor.to(self.pretrained_weight.device, self.pretrained_weight.dtype)
        check_range(largest_rounded(stored, self.factorizer.config.storage), self._changes)
        return stored

    def _bias_delta(self) -> Tensor | None:
        pretrained = self.pretrained_bias
        if pretrained is None or self.expert.is_pretrained(self.bias_name):
            return None
        bias = self.factorizer.count_bytes(read_finite(self.expert, self.bias_name, self.label))
        if torch.equal(pretrained, bias.to(pretrained.device, pretrained.dtype)):
            return None
        delta = bias.to(pretrained.device, torch.promote_types(bias.dtype, torch.float32)) - pretrained
        return check_range(delta.to(self.pretrained_weight.dtype), f"{self.label}: the change of {self.bias_name}")


@dataclass
class FactorizedExperts:
    """The factors and other changes of all experts, or of this process's part of them."""

    layers: dict[str, LayerFactors] = field(default_factory=dict)  # layer → what the experts add to it, in their order
    sums: dict[str, Tensor] = field(default_factory=dict)  # name of a tensor to average → the sum over the experts
    changes: dict[str, TensorChanges] = field(default_factory=dict)  # expert → what it changed; averages do not count

    def gather_layer(self, name: str, num_experts: int, partition: WorkPartition) -> LayerFactors:
        """Take the factors of one layer out of this object, with those of the other processes."""
        factors, *others = partition.all_gather(self.layers.pop(name, LayerFactors(num_experts)))
        for other in others:
            factors.extend(other)
        return cast(LayerFactors, factors)

    def gather_changes(self, experts: Iterable[str], partition: WorkPartition) -> dict[str, TensorChanges]:
        """What each expert changed, with what the other processes read."""
        gathered = {name: TensorChanges() for name in experts}
        for changes in partition.all_gather(self.changes):
            for name, change in changes.items():
                gathered[name].update(change)
        return gathered

    def add_to_sums(self, plan: Plan, expert: Source, label: str) -> None:
        """Add an expert's tensors outside the upscaled layers to the sums; PlanError if a tensor is not finite."""
        for name in plan.other_tensors:
            tensor = read_finite(expert, name, label)
            if tensor.is_floating_point():
                self.sums[name] = add_to_sum(self.sums.get(name), tensor)

    def check_averages(self, pretrained: Source, num_experts: int) -> None:
        """Raise PlanError if an average is outside the range of the pretrained model's dtype."""
        for name, total in self.sums.items():
            average(total, num_experts, name, pretrained.read(name).dtype)


def factorize_experts(
    plan: Plan, pretrained: nn.Module, experts: Mapping[str, ExpertSource], factorizer: Factorizer,
    partition: WorkPartition, factorized: FactorizedExperts, on_progress: ProgressCallback | None = None,
) -> None:  # fmt: skip
    """Factor this process's part of the (expert, layer) pairs into `factorized`, and read the experts' other tensors.

    Experts stream: each is opened when its turn comes, and dropped before the next one. `factorized` may hold factors
    of other experts. `on_progress` is called with the number of pairs done and in all. Raises PlanError if an expert
    does not fit, a tensor is not finite, or processes have other models.
    """
    source, aliases = StateDictSource(pretrained.state_dict()), stored_names(pretrained)
    opened = open_experts(plan, experts, source, aliases)
    check_same_models(partition, source, opened)
    loaded_digests: dict[str, str] = {}
    assigned = partition.assign([layer.work for _ in experts for layer in plan.layers])
    turns, done = iter(assigned), 0
    config = factorizer.config
    averaged = config.average_experts and partition.rank == 0  # one process sums in a fixed order
    for name, expert in experts.items():
        layers = [layer for layer, is_assigned in zip(plan.layers, turns, strict=False) if is_assigned]
        is_loaded = (expert_source := opened.pop(name)) is None
        if not (layers or averaged or (is_loaded and partition.size > 1)):
            continue
        if expert_source is None:
            expert_source = load_expert(plan, name, expert, source, aliases)
            if partition.size > 1:  # all processes load it, and compare its weights
                loaded_digests[name] = expert_source.digest()
        label, changes = f"expert {name!r}", factorized.changes.setdefault(name, TensorChanges())
        if averaged:
            check_averages(plan, source, expert_source, label, aliases)
            factorized.add_to_sums(plan, expert_source, label)
        elif not config.average_experts and layers[:1] == [plan.layers[0]]:  # in one of the processes
            changes.update(read_changes(plan, source, expert_source, label, aliases))
        items = [(layer, expert_source, label) for layer in layers]
        for layer, factors in zip(layers, factorizer.factorize(source, items), strict=True):
            changes.used[f"{layer.name}.weight"] = factors.squared_norm
            factorized.layers.setdefault(layer.name, LayerFactors(plan.num_experts)).append(factors)
            done += 1
            if on_progress:
                on_progress(done, sum(assigned))
        del expert_source, items  # with what they have mapped, before the next expert is opened
    factorized.check_averages(source, len(experts))
    check_same_experts(partition, loaded_digests)


def open_experts(
    plan: Plan, experts: Mapping[str, ExpertSource], pretrained: Source, aliases: Aliases
) -> dict[str, Source | None]:
    """Open every expert that can be opened without loading it; None for the others.

    Raises PlanError if an expert cannot be read, or has another architecture; it is refused before any factorization.
    """
    opened = {}
    for name, expert in experts.items():
        try:
            opened[name] = open_source(expert, pretrained, aliases)
        except PlanError as error:
            raise PlanError(f"expert {name!r}: {error}") from None
    return {name: source and _fitted(plan, name, source, pretrained) for name, source in opened.items()}


def load_expert(
    plan: Plan, name: str, expert: ExpertSource, pretrained: Source, aliases: Aliases
) -> Source:  # fmt: skip
    """Call the function that an expert is, and open what it returns; see `open_experts`."""
    source = open_source(cast(Callable[[], Any], expert)(), pretrained, aliases)
    assert source is not None, f"the function for expert {name!r} returned no model"
    return _fitted(plan, name, source, pretrained)


def _fitted(plan: Plan, name: str, source: Source, pretrained: Source) -> Source:
    """An expert with the pretrained model's shapes: its vocabulary may have another size, which is logged.

    An upscaled layer of another size is left as pretrained. Raises PlanError for any other difference.
    """
    shapes = source.shapes()
    resized = resizable_tensors(plan, shapes)
    check_expert(plan, name, shapes, resized)
    if not resized:
        return source
    upscaled = {f"{layer.name}.{parameter}" for layer in plan.layers for parameter in ("weight", "bias")}
    sizes = [f"{key} ({shapes[key][0]} rows instead of {plan.tensors[key][0]})" for key in resized]
    kept = [key for key in resized if key in upscaled]
    log.warning(
        "expert %r has tensors of another size: %s; the rows that both have are used%s",
        name, ", ".join(sizes), f", and {', '.join(kept)} is left as pretrained" if kept else "",
    )  # fmt: skip
    return ResizedSource(source, pretrained, resized, upscaled)


def _squared_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.double)) ** 2


def add_to_sum(total: Tensor | None, tensor: Tensor) -> Tensor:
    """A sum with one more tensor, in float32 or float64; it is modified. None starts a new one."""
    value = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return value.clone() if total is None else total.add_(value)


def average(total: Tensor, num_experts: int, name: str, dtype: torch.dtype) -> Tensor:
    """The mean of tensors called `name`, from their sum, in a dtype. Raises PlanError if it is outside the range."""
    return check_range((total / num_experts).to(dtype), f"the experts' average of {name}")
