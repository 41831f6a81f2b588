"""What one expert adds to one layer: from a source's tensors to factors, by the shortest way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import SmileConfig
from .factors import Factors, low_rank_svd, truncated_svd
from .kin import routed_class
from .layers import DENSE
from .plan import LayerPlan, check_finite
from .sources import Source
from .store import SMALLEST_RANK, FactorStore, digest, known_digest
from .workers import done, in_parallel


@dataclass(frozen=True)
class ExpertPart:
    """What one expert adds to one layer; every tensor in the pretrained layer's dtype and device, None if not needed.

    Shapes: gate (gate_rank, in), down (the directions that are no router rows, in), up (rank, out), dense (out, in),
    bias (out,). `energy` is the part of ‖ΔW‖² that the rank keeps, `made_of` the digest of the fine-tuned weight, or of
    a LoRA adapter's factors.
    """

    rank: int
    gate_rank: int
    down: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    energy: float = 1.0
    made_of: str = ""


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
    """What an expert did to a weight: its factored delta, or the dense one; the router's own factors."""

    factors: Factors | None = None
    dense: Tensor | None = None
    gate: Factors | None = None
    energy: float = 1.0
    made_of: str = ""


@dataclass
class Stored:
    """What the store has of a change, and under which names.

    Attributes:
        keys: "delta" and "weight" (the router's own rows) → the entry's name.
        found: of the same, the factors that are there.
        unchanged: the two weights are the same bytes.
        tuned: the digest of the fine-tuned weight.
    """

    keys: dict[str, str] = field(default_factory=dict)
    found: dict[str, Factors] = field(default_factory=dict)
    unchanged: bool = False
    tuned: str = ""


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
        return in_parallel(self._begin, jobs, self.workers)

    def _begin(self, job: Job) -> Future[ExpertPart] | Callable[[], ExpertPart]:
        """The part, where no large matrix has to be factored for it, or what makes it."""
        ranks, name = self._ranks(job.layer), f"{job.layer.name}.weight"
        if "weight" not in ranks:
            pair = job.expert.low_rank(name) if job.layer.k != DENSE else None
            if pair is not None:
                return done(self._part(job, self._factored_change(job, pair, ranks["delta"])))
            if job.expert.is_base(name):
                return done(self._part(job, Change()))
        stored = self._look_up(job, ranks)
        missing = ranks.keys() - stored.found.keys() - ({"delta"} if stored.unchanged else set())
        if self.store and not missing and (job.layer.k != DENSE or stored.unchanged):
            delta, gate = stored.found.get("delta"), stored.found.get("weight")
            return done(self._part(job, self._change(job, stored.tuned, delta, gate)))
        return lambda: self._part(job, self._computed(job, ranks, stored))

    def _ranks(self, layer: LayerPlan) -> dict[str, int]:
        """What has to be factored, at which rank: the delta; the fine-tuned weight, if the router's rows are of it."""
        gate_k = layer.gate_k if self.with_router else 0
        shared = self.config.routing_use_diff  # the router's rows are the first ones of the delta's factors
        ranks = {"delta": max(layer.k, gate_k if shared else 0), "weight": 0 if shared else gate_k}
        return {kind: rank for kind, rank in ranks.items() if rank > 0}

    def _look_up(self, job: Job, ranks: Mapping[str, int]) -> Stored:
        if self.store is None:
            return Stored()
        name = f"{job.layer.name}.weight"
        start = job.base.hash()
        end = known_digest(job.expert.identity(name), lambda: job.base.matrix(self._counted(job.expert.read(name))))
        unchanged, made_of = start == end, {"delta": ("delta", start, end), "weight": ("weight", end)}
        keys = {kind: self.store.key(*made_of[kind]) for kind in ranks if kind == "weight" or not unchanged}
        looked_up = {kind: self.store.get(key, ranks[kind]) for kind, key in keys.items()}
        device = self.config.compute_device
        found = {
            kind: Factors(*(tensor.to(device) for tensor in factors)) for kind, factors in looked_up.items() if factors
        }
        return Stored(keys, found, unchanged, end)

    def _computed(self, job: Job, ranks: Mapping[str, int], stored: Stored) -> Change:
        name = f"{job.layer.name}.weight"
        tuned = job.base.matrix(job.expert.read(name))
        if self.store is None:
            self._counted(tuned)
        check_finite(tuned, name, job.label)
        dtype = torch.promote_types(torch.promote_types(tuned.dtype, job.base.weight.dtype), torch.float32)
        weight, start = (tensor.to(self.config.compute_device, dtype) for tensor in (tuned, job.base.weight))

        def factors(kind: str, matrix: Tensor) -> Factors | None:
            if kind not in ranks:
                return None
            return stored.found.get(kind) or self._factor(matrix, ranks[kind], stored.keys.get(kind))

        made_of, gate = stored.tuned or digest(tuned), factors("weight", weight)
        if torch.equal(weight, start):
            return Change(gate=gate, made_of=made_of)
        delta = weight - start
        dense = delta if job.layer.k == DENSE else None
        return self._change(job, made_of, factors("delta", delta), gate, dense)

    def _change(
        self, job: Job, made_of: str, delta: Factors | None, gate: Factors | None, dense: Tensor | None = None
    ) -> Change:
        if dense is not None or delta is None or not delta.rank:
            return Change(delta if dense is not None else None, dense, gate, made_of=made_of)
        return Change(delta, gate=gate, energy=delta.energy(job.layer.k), made_of=made_of)

    def _factored_change(self, job: Job, pair: Sequence[Tensor], rank: int) -> Change:
        for tensor in pair:
            check_finite(self._counted(tensor), f"{job.layer.name}.weight", job.label)
        b, a = (tensor.to(self.config.compute_device) for tensor in pair)
        factors, made_of = low_rank_svd(b, a), "".join(digest(tensor) for tensor in pair)
        if factors.rank == 0:
            return Change(made_of=made_of)
        return Change(factors.truncated(rank), energy=factors.energy(job.layer.k), made_of=made_of)

    def _factor(self, matrix: Tensor, rank: int, key: str | None) -> Factors:
        if self.store is None or key is None:
            return truncated_svd(matrix, rank)
        asked = max(rank, min(SMALLEST_RANK, *matrix.shape))
        factors = truncated_svd(matrix, asked)
        self.store.put(key, factors, asked)
        return factors.truncated(rank)

    def _part(self, job: Job, change: Change) -> ExpertPart:
        layer, base = job.layer, job.base
        factors, gate, dense = change.factors, change.gate, change.dense
        gate_k = layer.gate_k if self.with_router else 0

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
            up=stored(factors.up[:, :rank].mT) if factors and low_rank else None,
            dense=stored(dense),
            bias=self._bias(job),
            energy=change.energy,
            made_of=change.made_of,
        )

    def _bias(self, job: Job) -> Tensor | None:
        name, base = f"{job.layer.name}.bias", job.base
        if base.bias is None or job.expert.is_base(name):
            return None
        tuned = self._counted(job.expert.read(name))
        check_finite(tuned, name, job.label)
        if torch.equal(base.bias, tuned.to(base.bias.device, base.bias.dtype)):
            return None
        delta = tuned.to(base.bias.device, torch.promote_types(tuned.dtype, torch.float32)) - base.bias
        return delta.to(base.weight.dtype)

    def _counted(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor
