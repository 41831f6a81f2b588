"""What runs in a loaded model; imports torch alone, and transformers for the class of `Conv1D`."""

from .attachment import attach_router, deciding_module, detach_router, entry_points, router_of
from .attention import SplitMultiheadAttention, split_attention
from .energy import (
    RIDGE,
    SCORED_ROWS,
    energy_shares,
    num_scored_rows,
    router_singular_values,
    routing_features,
    token_energies,
)
from .input_execution import InputGroups
from .input_router import ROUTER_NAME, InputRouter, num_scored
from .inspection import (
    LayerRouting,
    LayerStatistics,
    as_expert,
    choose_experts,
    observe_routing,
    record_choices,
    record_routing,
    routing_statistics,
    use_experts,
    weight_by_expert,
)
from .layer_types import LAYER_TYPES, SmileConv1D, SmileConv2d, SmileLinear, plain_type_of, routed_type_of
from .layout import DENSE, ExpertLayout
from .merged_weights import KEPT_BYTES, MergedWeights, merge
from .prototypes import Prototypes
from .quantization import dequantized, quantize_groups, quantize_rows, row_size, store_tensors
from .routed import RoutedLayer, RoutingEvent, count_bytes, count_parameters, layers_with_router, routed_layers
from .routing_state import MIN_ENERGY_SHARE, RoutingState, mean_over_tokens
from .scoring import expert_norms, project_on_router, router_scores, routing_weights, select_experts

__all__ = [
    "DENSE", "KEPT_BYTES", "LAYER_TYPES", "MIN_ENERGY_SHARE", "RIDGE", "ROUTER_NAME", "SCORED_ROWS", "ExpertLayout",
    "InputGroups", "InputRouter", "LayerRouting", "LayerStatistics", "MergedWeights", "Prototypes", "RoutedLayer",
    "RoutingEvent", "RoutingState", "SmileConv1D", "SmileConv2d", "SmileLinear", "SplitMultiheadAttention",
    "as_expert", "attach_router", "choose_experts", "count_bytes", "count_parameters", "deciding_module",
    "dequantized", "detach_router", "energy_shares", "entry_points", "expert_norms", "layers_with_router",
    "mean_over_tokens", "merge", "num_scored", "num_scored_rows", "observe_routing", "plain_type_of",
    "project_on_router", "quantize_groups", "quantize_rows", "record_choices", "record_routing", "routed_layers",
    "routed_type_of", "router_of", "router_scores", "router_singular_values", "routing_features",
    "routing_statistics", "routing_weights", "row_size", "select_experts", "split_attention", "store_tensors",
    "token_energies", "use_experts", "weight_by_expert",
]  # fmt: skip
