"""What validation inputs choose: ranks for each budget, and how much merging methods scale task vectors."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ...budget import Allocation
from ...errors import ConfigError
from ...layers import Routed
from ...store import FactorStore
from .benches import Bench
from .judge import run
from .models import Experts, build
from .rivals import best_scaling
from .variants import LARGEST_RANK, OWN, PAPER, RATIOS, Ranks, Variant

log = logging.getLogger(__name__)

GATES = (32, 16, 8, 4, 2, 1)
CANDIDATES = 2  # of the gate ranks that fit a budget, the largest


def choices(at: Bench, store: FactorStore) -> dict[str, Any]:
    """The ranks of each budget, for the paper's routing and for ours, and what merging scales by."""
    experts = at.experts()
    of_variants = {"paper": PAPER, "ours": OWN[0]}
    found: dict[str, Any] = {
        name: [asdict(choose(at, experts, ratio, variant, store)) for ratio in RATIOS]
        for name, variant in of_variants.items()
    }

    def average(model: nn.Module) -> float:
        right = [at.correct(model, task, "validation") for task in at.tasks]
        return torch.cat(right).float().mean().item()

    return {**found, "scaling": best_scaling(at, average)}


def choose(at: Bench, experts: Experts, ratio: float, variant: Variant, store: FactorStore) -> Ranks:
    """gate_k and allocation of a budget."""
    found: dict[Ranks, float] = {}
    seen: dict[tuple[tuple[int, ...], ...], Tensor] = {}
    for gate_k in (gate_k for gate_k in GATES if gate_k <= LARGEST_RANK[at.chosen]):
        for allocation in get_args(Allocation):
            ranks = Ranks(ratio, gate_k, allocation)
            try:
                model = build(at, experts, ranks, variant, store)
            except ConfigError:
                break  # this many router rows don't fit
            of_layers = [module.layout for module in model.modules() if isinstance(module, Routed)]
            # with all the ranks there are, the allocation makes no difference
            bought = (of_layers[0].gate_ranks, *(layout.ranks for layout in of_layers))
            if bought not in seen:
                seen[bought] = run(at, model, "validation")[0]
            found[ranks] = seen[bought].float().mean().item()
            log.info("%s, %s: %.1f on validation inputs", ranks, variant.name, 100 * found[ranks])
        if len({ranks.gate_k for ranks in found}) == CANDIDATES:
            break
    return max(found, key=lambda ranks: found[ranks])
