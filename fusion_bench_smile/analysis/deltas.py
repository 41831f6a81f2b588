"""The task vectors of all experts, layer by layer: what the studies of weights look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..kin import routed_class
from ..plan import make_plan
from ..sources import Openable, StateSource, open_source, tied_names
from ..upscale import open_all


@dataclass(frozen=True)
class LayerDeltas:
    """One linear layer.

    Attributes:
        name: in the pretrained model.
        weight: W₀ (out, in), in at least float32.
        experts: expert → ΔW (out, in).
    """

    name: str
    weight: Tensor
    experts: dict[str, Tensor]

    @property
    def type(self) -> str:
        """The last part of the name, e.g. ``fc1``."""
        return self.name.rsplit(".", 1)[-1]


@torch.no_grad()
def layer_deltas(pretrained: nn.Module, experts: Mapping[str, Openable]) -> Iterator[LayerDeltas]:
    """Every layer that `upscale` would upscale.

    Experts that are folders are read tensor by tensor; functions that load one are called once, and all are kept.

    Raises:
        PlanError: for models that can't be upscaled together; see `upscale`.
    """
    plan = make_plan(pretrained, len(experts), SmileConfig(k=1, gate_k=1))
    base, aliases = StateSource(pretrained.state_dict()), tied_names(pretrained)
    opened = open_all(plan, experts, base, aliases)
    sources = {
        name: source or open_source(cast(Callable[[], Any], experts[name])(), base, aliases)
        for name, source in opened.items()
    }
    for layer in plan.layers:
        matrix = routed_class(pretrained.get_submodule(layer.name)).matrix
        key = f"{layer.name}.weight"
        plain = base.read(key)
        weight = matrix(plain.to(torch.promote_types(plain.dtype, torch.float32)))
        tuned = {name: matrix(source.read(key)).to(weight) for name, source in sources.items() if source is not None}
        yield LayerDeltas(layer.name, weight, {name: matrix - weight for name, matrix in tuned.items()})
