"""Studies of task vectors and routers: subspaces, explained variance, router accuracy, error accumulation, costs."""

from .accumulation import error_accumulation
from .capture import ModelCall, blocks, capture_calls, capture_outputs
from .costs import costs
from .deltas import LayerDeltas, layer_deltas
from .routing import coinciding_gates, confusion, layer_accuracy, layer_load, routing_by_task, token_choices
from .subspace import ZONES, Zones, project_onto_zone, subspace_energy
from .variance import Recommendation, added_parameters, explained_variance, ranks_needed, recommend

__all__ = [
    "ZONES", "LayerDeltas", "ModelCall", "Recommendation", "Zones", "added_parameters", "blocks", "capture_calls",
    "capture_outputs", "coinciding_gates", "confusion", "costs", "error_accumulation", "explained_variance",
    "layer_accuracy", "layer_deltas", "layer_load", "project_onto_zone", "ranks_needed", "recommend",
    "routing_by_task", "subspace_energy", "token_choices",
]  # fmt: skip
