"""Construction of upscaled models: plan, factorization, assembly, and what is done to a model afterwards."""

from ..io import tensor_digest
from .assemble import set_routing
from .calibration import calibrate, check_calibration
from .edit import add_expert, dequantize, remove_expert
from .factor_cache import FactorCache
from .factorize import load_expert, open_experts
from .layer_selection import split_targeted_attention
from .parallel import WorkPartition, destroy_process_group_at_exit
from .plan import LayerPlan, Plan, estimate_seconds, make_plan
from .plan_table import plan_table
from .streaming import upscale_to_folder
from .svd import Factors, low_rank_svd, truncated_svd
from .upscale import plan_upscaling, upscale

__all__ = [
    "FactorCache", "Factors", "LayerPlan", "Plan", "WorkPartition", "add_expert", "calibrate", "check_calibration",
    "dequantize", "destroy_process_group_at_exit", "estimate_seconds", "load_expert", "low_rank_svd", "make_plan",
    "open_experts", "plan_table", "plan_upscaling", "remove_expert", "set_routing", "split_targeted_attention",
    "tensor_digest", "truncated_svd", "upscale", "upscale_to_folder",
]  # fmt: skip
