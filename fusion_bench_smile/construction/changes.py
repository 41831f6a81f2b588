"""What experts changed, and which part of it the upscaled model does not use."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..exceptions import PlanError
from ..io import Provenance, Source
from ..io.metadata import NUM_LARGEST, ExpertChange
from .plan import Plan, check_finite

log = logging.getLogger(__name__)

MAX_RECURRENT_SHARE = 0.5  # of an expert's change; above, the upscaled model would be closer to the pretrained one
CHUNK = 2**22  # entries that are converted to float64 at a time


@dataclass
class TensorChanges:
    """The energies ‖Δ‖² of one expert's tensors by name, or of those that one process read."""

    used: dict[str, float] = field(default_factory=dict)
    unused: dict[str, float] = field(default_factory=dict)

    def update(self, other: "TensorChanges") -> None:
        """Add those that another process read."""
        self.used |= other.used
        self.unused |= other.unused

    @property
    def energy(self) -> float:
        """The sum over all tensors, in which their order does not matter."""
        return math.fsum((*self.used.values(), *self.unused.values()))


def read_finite(source: Source, name: str, label: str) -> Tensor:
    """Read a tensor of the model `label`, and refuse NaN and infinity; see `check_finite`."""
    tensor = source.read(name)
    check_finite(tensor, name, label)
    return tensor


def squared_distance(tensor: Tensor, pretrained: Tensor) -> float:
    """‖tensor − pretrained‖². Entries of other dtypes than floating-point ones (indices, counts) do not count.

    A tensor that equals the pretrained one in its dtype is unchanged: an expert may be stored in half precision.
    """
    if not tensor.is_floating_point():
        return 0.0
    total, parts = 0.0, (x.detach().reshape(-1).split(CHUNK) for x in (tensor, pretrained))
    for part, start in zip(*parts, strict=True):
        if not torch.equal(part, start.to(part.device, part.dtype)):
            total += float((part.double() - start.to(part.device, torch.double)).square().sum())
    return total


def read_changes(
    plan: Plan, pretrained: Source, expert: Source, label: str, aliases: Mapping[str, tuple[str, ...]],
) -> TensorChanges:  # fmt: skip
    """Read an expert's tensors outside the upscaled layers, which the model does not use.

    A tensor with several names counts once. Raises PlanError if a tensor is not finite.
    """
    changes = TensorChanges()
    for name in (*plan.other_tensors, *plan.tied_tensors):
        if expert.is_pretrained(name):
            continue
        energy = squared_distance(read_finite(expert, name, label), pretrained.read(name))
        energies = changes.unused
        if energy:
            first = next((other for other in aliases.get(name, ()) if other in energies), name)
            energies[first] = max(energy, energies.get(first, 0.0))
    return changes


def check_averages(
    plan: Plan, pretrained: Source, expert: Source, label: str, aliases: Mapping[str, tuple[str, ...]]
) -> None:  # fmt: skip
    """Raise PlanError if an expert's tensor cannot be averaged.

    An upscaled layer may hold it too, and its experts add to the pretrained weight. Or the expert has two tensors where
    the pretrained model has one.
    """
    for name in plan.tied_tensors:
        changed = not expert.is_pretrained(name) and squared_distance(expert.read(name), pretrained.read(name))
        if changed:
            layer = plan.tied_tensors[name]
            raise PlanError(
                f"{label} changed {name}, which average_experts=true would average, and which is also the weight of "
                f"the upscaled layer {layer}: leave that out with exclude_modules=['{layer}']"
            )
    for name in plan.other_tensors:
        for other in (other for other in aliases.get(name, ()) if other in plan.tensors):
            untied = not (expert.is_pretrained(name) and expert.is_pretrained(other))
            if untied and squared_distance(expert.read(name), expert.read(other)):
                raise PlanError(
                    f"{label} has two tensors {name} and {other}, which are one in the pretrained model, and "
                    "average_experts=true averages that: use average_experts=false"
                )


def check_recurrent(plan: Plan, changes: Mapping[str, TensorChanges]) -> None:
    """Raise PlanError if an expert differs from the pretrained model mostly in recurrent layers."""
    for expert, change in changes.items():
        recurrent = {name: energy for name, energy in change.unused.items() if name in plan.recurrent_tensors}
        share = math.fsum(recurrent.values()) / (change.energy or 1.0)
        if share > MAX_RECURRENT_SHARE:
            largest = max(recurrent, key=lambda name: recurrent[name])
            raise PlanError(
                f"expert {expert!r} has {share:.0%} of its change in recurrent layers (LSTM, GRU, RNN), which are not "
                f"upscaled (largest: {largest}); use average_experts=true, or another merging method"
            )


def expert_changes(changes: Mapping[str, TensorChanges]) -> dict[str, ExpertChange]:
    """The changes of all experts for the provenance, with the tensors that are the largest over all of them."""
    totals = Counter[str]()
    for change in changes.values():
        totals.update(change.unused)
    largest = [name for name, _ in totals.most_common(NUM_LARGEST)]
    return {name: _expert_change(change, largest) for name, change in changes.items()}


def _expert_change(change: TensorChanges, largest: Iterable[str]) -> ExpertChange:
    energies = {name: _rounded(change.unused[name]) for name in largest if name in change.unused}
    return ExpertChange(_rounded(change.energy), _rounded(math.fsum(change.unused.values())), energies)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # more digits depend on the machine


def warn_of_unused_changes(provenance: Provenance) -> None:
    """Log which part of the experts' change an upscaled model does not use, if there is any."""
    if unused := provenance.describe_unused():
        log.warning(
            "the upscaled model does not use %s: it lies outside the upscaled layers; average_experts=true averages it",
            unused,
        )  # fmt: skip
