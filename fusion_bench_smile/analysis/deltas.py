"""Task vectors of all experts, layer by layer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import SmileConfig
from ..construction import make_plan, open_experts
from ..io import ExpertSource, StateDictSource, open_source, tied_names
from ..nn import routed_type_of


@dataclass(frozen=True)
class LayerDeltas:
    """The deltas of one layer."""

    name: str  # in the pretrained model
    weight: Tensor  # W₀ (out, in), at least float32
    experts: dict[str, Tensor]  # expert → ΔW (out, in), in the dtype of the weight

    @property
    def type(self) -> str:
        """The last part of the name, e.g. ``fc1``."""
        return self.name.rsplit(".", 1)[-1]


@torch.no_grad()
def layer_deltas(pretrained: nn.Module, experts: Mapping[str, ExpertSource]) -> Iterator[LayerDeltas]:
    """The deltas of every layer that `upscale` upscales.

    Experts in folders are read tensor by tensor; an expert given by a function is loaded once and kept in memory.

    Raises:
        PlanError: If the models cannot be upscaled together; see `upscale`.
    """
    plan = make_plan(pretrained, len(experts), SmileConfig(k=1, gate_k=1))
    base, aliases = StateDictSource(pretrained.state_dict()), tied_names(pretrained)
    opened = open_experts(plan, experts, base, aliases)
    sources = {
        name: source or open_source(cast(Callable[[], Any], experts[name])(), base, aliases)
        for name, source in opened.items()
    }
    for layer in plan.layers:
        matrix = routed_type_of(pretrained.get_submodule(layer.name)).weight_matrix
        key = f"{layer.name}.weight"
        stored = base.read(key)
        weight = matrix(stored.to(torch.promote_types(stored.dtype, torch.float32)))
        tuned = {name: matrix(source.read(key)).to(weight) for name, source in sources.items() if source is not None}
        yield LayerDeltas(layer.name, weight, {name: expert - weight for name, expert in tuned.items()})
