"""The variants that are compared: routing options, and the rank options of each parameter budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from fusion_bench_smile import SmileConfig
from fusion_bench_smile.config import Allocation, ExpertParameters, RoutingScope, RoutingScore, Storage

BUDGETS = (1.1, 1.25, 1.35, 1.5, 2.0)  # upper bounds of the parameter ratio
TWO_PASS_BUDGETS = (1.35,)  # budgets at which only two-pass variants and the paper's routing are measured
MAX_RANK = {"gentle": 64, "strong": 64, "full": 128, "lora": 8}
CALIBRATION_SIZES = (4, 16, 64)


@dataclass(frozen=True)
class Variant:
    """Routing options of a model.

    Attributes:
        scope: ``routing_scope``.
        score: ``routing_score``.
        top_k: Number of experts of an input.
        noise_baseline: Scores are standardised by scores of random inputs.
        calibration: Number of calibration inputs of each task; 0 is zero-shot.
        expert_parameters: ``layers`` or ``norms``.
        storage: ``same`` or ``int8``.
        paper_ranks: The rank options are those selected for the paper's routing, not those selected for two passes.
    """

    scope: RoutingScope
    score: RoutingScore = "norm"
    top_k: int = 1
    noise_baseline: bool = False
    calibration: int = 0
    expert_parameters: ExpertParameters = "layers"
    storage: Storage = "same"
    paper_ranks: bool = False

    @property
    def name(self) -> str:
        """The name of the variant in the stored tables."""
        parts = [self.scope, f"calibrated by {self.calibration}" if self.calibration else self.score]
        parts += [f"top_k={self.top_k}"] if self.top_k > 1 else []
        parts += ["noise baseline"] if self.noise_baseline else []
        parts += ["own norms"] if self.expert_parameters == "norms" else []
        parts += ["int8"] if self.storage == "int8" else []
        parts += ["the paper's"] if self.paper_ranks else []
        return ", ".join(parts)


PAPER = Variant("token", paper_ranks=True)
# a token's relative scores rank the experts as the norms do
SCOPES_AND_SCORES = [
    Variant(scope, score)
    for scope, score in product(get_args(RoutingScope), get_args(RoutingScore))
    if (scope, score) != ("token", "relative")
]
TWO_PASS = Variant("two_pass", "dual")
EXTENSIONS = [
    replace(TWO_PASS, top_k=2),
    replace(TWO_PASS, noise_baseline=True),
    Variant("two_pass", "weighted", noise_baseline=True),
    *(replace(TWO_PASS, top_k=2, calibration=size) for size in CALIBRATION_SIZES),
]
# the routing of smile_row=smile_two_pass and of smile_row=smile_calibrated
ZERO_SHOT, CALIBRATED = (
    replace(TWO_PASS, top_k=2, calibration=size, expert_parameters="norms") for size in (0, CALIBRATION_SIZES[-1])
)
ZERO_SHOT_INT8, CALIBRATED_INT8 = (replace(variant, storage="int8") for variant in (ZERO_SHOT, CALIBRATED))
EXPERT_NORMS, INT8 = [ZERO_SHOT, CALIBRATED], [ZERO_SHOT_INT8, CALIBRATED_INT8]
VARIANTS = [PAPER, *SCOPES_AND_SCORES, *EXTENSIONS, *EXPERT_NORMS, *INT8]


@dataclass(frozen=True)
class RankOptions:
    """Options of the ranks of a model.

    Attributes:
        ratio: ``param_ratio``, the budget.
        gate_k: Rank of the router.
        allocation: ``uniform``, ``energy`` or ``gain``.
    """

    ratio: float
    gate_k: int
    allocation: Allocation

    def config(self, expert_set: str, variant: Variant) -> SmileConfig:
        """The options of a model of a set of experts, without noise baseline, which the study computes itself."""
        return SmileConfig(
            k=MAX_RANK[expert_set],
            gate_k=self.gate_k,
            param_ratio=self.ratio,
            allocation=self.allocation,
            routing_scope=variant.scope,
            routing_score=variant.score,
            top_k=variant.top_k,
            expert_parameters=variant.expert_parameters,
            storage=variant.storage,
        )
