"""What is compared: ways to route, and the ranks that validation chooses for a budget of parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from ...budget import Allocation
from ...config import SmileConfig
from ...layers import Score
from ...scopes import Scope

RATIOS = (1.1, 1.25, 1.35, 1.5, 2.0)
IN_TWO_PASSES = (1.35,)  # budgets at which, beside the paper's, only these variants are measured
LARGEST_RANK = {"gentle": 64, "strong": 64, "full": 128, "lora": 8}
CALIBRATION = (4, 16, 64)


@dataclass(frozen=True)
class Variant:
    """A way to route.

    Attributes:
        inputs: of each task, for calibration; 0 is zero-shot.
        own: what of an expert is used.
        paper: with the ranks that are best for the paper's routing, not for ours.
    """

    scope: Scope
    score: Score = "norm"
    top_k: int = 1
    noise: bool = False
    inputs: int = 0
    own: str = "layers"
    storage: str = "same"
    paper: bool = False

    @property
    def name(self) -> str:
        parts = [self.scope, f"calibrated by {self.inputs}" if self.inputs else self.score]
        parts += [f"top_k={self.top_k}"] if self.top_k > 1 else []
        parts += ["noise baseline"] if self.noise else []
        parts += ["own norms"] if self.own == "norms" else []
        parts += ["int8"] if self.storage == "int8" else []
        parts += ["the paper's"] if self.paper else []
        return ", ".join(parts)


PAPER = Variant("token", paper=True)
# a token's relative scores rank the experts as their norms do
GRID = [Variant(o, s) for o, s in product(get_args(Scope), get_args(Score)) if (o, s) != ("token", "relative")]
BEST = Variant("two_pass", "dual")
MORE = [
    replace(BEST, top_k=2),
    replace(BEST, noise=True),
    Variant("two_pass", "weighted", noise=True),
    *(replace(BEST, top_k=2, inputs=n) for n in CALIBRATION),
]
OWN = [replace(BEST, top_k=2, inputs=n, own="norms") for n in (0, CALIBRATION[-1])]
INT8 = [replace(variant, storage="int8") for variant in (OWN[0], OWN[-1])]


@dataclass(frozen=True)
class Ranks:
    """What validation chose for a budget."""

    ratio: float
    gate_k: int
    allocation: Allocation

    def config(self, chosen: str, variant: Variant) -> SmileConfig:
        """The options of a model of a set of experts; calibration and baselines are `looks`'."""
        return SmileConfig(
            k=LARGEST_RANK[chosen],
            gate_k=self.gate_k,
            param_ratio=self.ratio,
            allocation=self.allocation,
            routing_scope=variant.scope,
            routing_score=variant.score,
            top_k=variant.top_k,
            expert_parameters=variant.own,
            storage=variant.storage,
        )
