"""What one expert adds to one layer: from a source's tensors to factors, by the shortest way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import SmileConfig
from .factors import Factors, low_rank_svd, truncated_svd
from .kin import routed_class
from .layers import DENSE
from .plan import LayerPlan, check_finite
from .sources import Source
from .store import SMALLEST_RANK, FactorStore, digest
from .workers import in_parallel


@dataclass(frozen=True)
class ExpertPart:
    """What one expert adds to one layer; every tensor in the pretrained layer's dtype and device, None if not needed.

    Shapes: gate (gate_rank, in), down (the directions that are no router rows, in), up (out, rank), dense (out, in),
    bias (out,). `energy` is the part of ‖ΔW‖² that the rank keeps.
    """

    rank: int
    gate_rank: int
    down: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    energy: float = 1.0


@dataclass
class Base:
    """One layer of the pretrained model: its tensors, and the weight's digest once a store asked for it.

    Attributes:
        weight: as a matrix (out, in).
        matrix: what makes such a matrix of a weight.
    """

    weight: Tensor
    bias: Tensor | None
    matrix: Callable[[Tensor], Tensor]
    digest: str | None = None

    @classmethod
    def of(cls, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Base:
        """Of a layer's kind, with these tensors."""
        matrix = routed_class(layer).matrix
        return cls(matrix(weight.detach()), None if bias is None else bias.detach(), matrix)

    def hash(self) -> str:
        if self.digest is None:
            self.digest = digest(self.weight)
        return self.digest


class Job(NamedTuple):
    """One item of work: what the expert `label` adds to one layer."""

    layer: LayerPlan
    base: Base
    expert: Source
    label: str


@dataclass(frozen=True)
class Change:
    """What an expert did to a weight: its factored delta, or the dense one; the router's own factors; energy kept."""

    factors: Factors | None = None
    dense: Tensor | None = None
    gate: Factors | None = None
    energy: float = 1.0


@dataclass
class Factorer:
    """Makes the parts of all layers and experts, with one set of options.

    Attributes:
        with_router: False for a single expert, which needs none.
        workers: how many parts are made at a time.
        bytes_read: of the experts' tensors, so far.
    """

    config: SmileConfig
    with_router: bool
    store: FactorStore | None = None
    workers: int = 1
    bytes_read: int = field(default=0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def parts(self, jobs: Sequence[Job]) -> Iterator[ExpertPart]:
        """The part of every job, in order, several at a time.

        Raises:
            PlanError: naming the expert and the tensor that is not finite.
        """
        tiny = all(job.expert.in_factors for job in jobs)
        return in_parallel(lambda job: self._part(*job), jobs, self.workers, one_at_a_time=tiny)

    def _part(self, layer: LayerPlan, base: Base, expert: Source, label: str) -> ExpertPart:
        bias_name, bias = f"{layer.name}.bias", None
        if base.bias is not None and not expert.is_base(bias_name):
            tuned = self._counted(expert.read(bias_name))
            check_finite(tuned, bias_name, label)
            bias = self._bias(base, tuned)
        gate_k = layer.gate_k if self.with_router else 0
        shared = self.config.routing_use_diff  # the router's rows are the first ones of the delta's factors
        change = self._change(
            layer, base, expert, label, needed=max(layer.k, gate_k if shared else 0), own_gate=0 if shared else gate_k
        )
        factors, gate, dense = change.factors, change.gate, change.dense

        def stored(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(base.weight.device, base.weight.dtype)

        low_rank = factors is not None and layer.k != DENSE
        rank = min(layer.k, factors.rank) if factors and low_rank else 0
        router = gate or (factors.truncated(gate_k) if factors else None)
        gate_rank = router.rank if router else 0
        return ExpertPart(
            rank=DENSE if dense is not None else rank,
            gate_rank=gate_rank,
            gate=stored(router.down) if router else None,
            down=stored(factors.down[0 if gate else min(gate_rank, rank) : rank]) if factors else None,
            up=stored(factors.up[:, :rank]) if factors and low_rank else None,
            dense=stored(dense),
            bias=bias,
            energy=change.energy,
        )

    def _change(self, layer: LayerPlan, base: Base, expert: Source, label: str, needed: int, own_gate: int) -> Change:
        name = f"{layer.name}.weight"
        if layer.k != DENSE and not own_gate:
            pair = expert.low_rank(name)
            if pair is not None:
                for tensor in pair:
                    check_finite(self._counted(tensor), name, label)
                return self._factored_change(pair, needed, layer.k)
        if expert.is_base(name) and not own_gate:
            return Change()
        tuned = base.matrix(self._counted(expert.read(name)))
        dtype = torch.promote_types(torch.promote_types(tuned.dtype, base.weight.dtype), torch.float32)
        weight, start = (tensor.to(self.config.compute_device, dtype) for tensor in (tuned, base.weight))

        def checked() -> Tensor:
            check_finite(tuned, name, label)  # what is found in the store was finite
            return weight

        # what the store's keys are made of also tells whether anything changed
        digests = (base.hash(), digest(tuned)) if self.store else ("", "")
        same = (
            digests[0] == digests[1] if self.store and tuned.dtype == base.weight.dtype else torch.equal(weight, start)
        )
        change = Change()
        if not same:
            factors = None
            if needed:
                factors = self._factor(lambda: checked() - start, needed, ("delta", *digests, str(dtype)))
            if layer.k == DENSE:
                change = Change(factors, dense=checked() - start)
            elif factors and factors.rank:
                change = Change(factors, energy=factors.energy(layer.k))
        if own_gate:
            gate = self._factor(checked, own_gate, ("weight", digests[1], str(dtype)))
            change = replace(change, gate=gate)
        return change

    def _counted(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def _bias(self, base: Base, tuned: Tensor) -> Tensor | None:
        assert base.bias is not None
        if torch.equal(base.bias, tuned.to(base.bias.device, base.bias.dtype)):
            return None
        delta = tuned.to(base.bias.device, torch.promote_types(tuned.dtype, torch.float32)) - base.bias
        return delta.to(base.weight.dtype)

    def _factored_change(self, pair: Sequence[Tensor], needed: int, k: int) -> Change:
        b, a = (tensor.to(self.config.compute_device) for tensor in pair)
        factors = low_rank_svd(b, a)
        if factors.rank == 0:
            return Change()
        return Change(factors.truncated(needed), energy=factors.energy(k))

    def _factor(self, matrix: Callable[[], Tensor], rank: int, made_of: tuple[str, ...]) -> Factors:
        if self.store is None:
            return truncated_svd(matrix(), rank)
        key = self.store.key(*made_of)
        found = self.store.get(key, rank)
        if found is not None:
            return Factors(*(tensor.to(self.config.compute_device) for tensor in found))
        work = matrix()
        asked = max(rank, min(SMALLEST_RANK, *work.shape))
        factors = truncated_svd(work, asked)
        self.store.put(key, factors, asked)
        return factors.truncated(rank)
