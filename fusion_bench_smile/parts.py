"""What one expert adds to one layer: from a source's tensors to factors, by the shortest way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import cast

import torch
from torch import Tensor, nn

from .config import SmileConfig
from .factors import Factors, low_rank_svd, truncated_svd
from .layers import DENSE
from .plan import LayerPlan, check_finite
from .sources import Source
from .store import SMALLEST_RANK, FactorStore, digest


@dataclass(frozen=True)
class ExpertPart:
    """What one expert adds to one layer; every tensor in the pretrained layer's dtype and device, None if not needed.

    Shapes: down (rows, in), up (out, rank), gate (gate_rank, in), dense (out, in), bias (out,). `energy` is the part
    of ‖ΔW‖² that the rank keeps.
    """

    rank: int
    gate_rank: int
    down: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    energy: float = 1.0

    @property
    def changes_nothing(self) -> bool:
        return self.rank == 0 and self.bias is None

    def to(self, device: torch.device) -> ExpertPart:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v.to(device) for n, v in moved.items() if isinstance(v, Tensor)})  # type: ignore[arg-type]


@dataclass
class Base:
    """One layer of the pretrained model: its tensors, and the weight's digest once a store asked for it."""

    weight: Tensor
    bias: Tensor | None
    digest: str | None = None

    @classmethod
    def of(cls, model: nn.Module, layer: str) -> Base:
        linear = model.get_submodule(layer)
        return cls(
            cast(Tensor, linear.weight).detach(), None if linear.bias is None else cast(Tensor, linear.bias).detach()
        )

    def hash(self) -> str:
        if self.digest is None:
            self.digest = digest(self.weight)
        return self.digest


@dataclass
class Factorer:
    """Makes the parts of all layers and experts, with one set of options.

    Attributes:
        with_router: False for a single expert, which needs none.
        bytes_read: of the experts' tensors, so far.
    """

    config: SmileConfig
    with_router: bool
    store: FactorStore | None = None
    bytes_read: int = field(default=0)

    def part(self, layer: LayerPlan, base: Base, expert: Source, label: str) -> ExpertPart:
        """What the expert `label` adds to a layer.

        Raises:
            PlanError: naming the expert and the tensor that is not finite.
        """
        weight_name, bias_name = f"{layer.name}.weight", f"{layer.name}.bias"
        bias = None
        if base.bias is not None and not expert.is_base(bias_name):
            bias = self._bias(base, self._read(expert, bias_name, label))
        gate_k = layer.gate_k if self.with_router else 0
        own_gate = gate_k if not self.config.routing_use_diff else 0
        needed = max(layer.k, gate_k if self.config.routing_use_diff else 0)
        factors, dense, gate, energy = None, None, None, 1.0
        pair = expert.low_rank(weight_name)
        if pair is not None:
            for tensor in pair:
                check_finite(tensor, weight_name, label)
            self.bytes_read += sum(tensor.nbytes for tensor in pair)
        if pair is not None and layer.k != DENSE and not own_gate:
            factors, energy = self._factored(pair, needed, layer.k)
        elif own_gate or not expert.is_base(weight_name):
            tuned = self._read(expert, weight_name, label)
            delta = self._work(tuned, base) - self._work(base.weight, base)
            if bool(delta.any()):
                dense = delta if layer.k == DENSE else None
                if needed > 0:
                    factors = self._factor(delta, needed, lambda: ("delta", base.hash(), digest(tuned)))
                    energy = float(factors.s[: layer.k].square().sum() / delta.square().sum()) if dense is None else 1.0
            if own_gate:
                gate = self._factor(self._work(tuned, base), own_gate, lambda: ("weight", digest(tuned)))

        def stored(tensor: Tensor) -> Tensor:
            return tensor.to(base.weight.device, base.weight.dtype)

        gate_rank = gate.rank if gate else (min(gate_k, factors.rank) if factors else 0)
        down = factors.down[: max(layer.k, gate_rank if not gate else 0)] if factors else None
        return ExpertPart(
            rank=DENSE if dense is not None else (min(layer.k, factors.rank) if factors and layer.k != DENSE else 0),
            gate_rank=gate_rank,
            down=None if down is None else stored(down),
            up=stored(factors.up[:, : layer.k]) if factors and layer.k != DENSE else None,
            gate=stored(gate.down) if gate else None,
            dense=None if dense is None else stored(dense),
            bias=bias,
            energy=energy,
        )

    def _read(self, expert: Source, name: str, label: str) -> Tensor:
        tensor = expert.read(name)
        check_finite(tensor, name, label)
        self.bytes_read += tensor.nbytes
        return tensor

    def _work(self, tensor: Tensor, base: Base) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(tensor.dtype, base.weight.dtype), torch.float32)
        return tensor.to(self.config.compute_device, dtype)

    def _bias(self, base: Base, tuned: Tensor) -> Tensor | None:
        assert base.bias is not None
        if torch.equal(base.bias, tuned.to(base.bias.device, base.bias.dtype)):
            return None
        delta = tuned.to(base.bias.device, torch.promote_types(tuned.dtype, torch.float32)) - base.bias
        return delta.to(base.weight.dtype)

    def _factored(self, pair: Sequence[Tensor], needed: int, k: int) -> tuple[Factors | None, float]:
        b, a = (tensor.to(self.config.compute_device) for tensor in pair)
        factors = low_rank_svd(b, a)
        if factors.rank == 0:
            return None, 1.0
        total, kept = factors.s.square().sum(), factors.s[:k].square().sum()
        return factors.truncated(needed), float(kept / total)

    def _factor(self, matrix: Tensor, rank: int, made_of: Callable[[], tuple[str, ...]]) -> Factors:
        if self.store is None:
            return truncated_svd(matrix, rank)
        key = self.store.key(*made_of(), str(matrix.dtype))
        found = self.store.get(key, rank)
        if found is not None:
            return Factors(*(tensor.to(matrix.device) for tensor in found))
        asked = max(rank, min(SMALLEST_RANK, *matrix.shape))
        factors = truncated_svd(matrix, asked)
        self.store.put(key, factors, asked)
        return factors.truncated(rank)
