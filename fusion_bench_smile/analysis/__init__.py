"""Studies of task vectors and routers: subspaces, explained variance, router accuracy, error accumulation, costs."""

from .capture import ModelCall, blocks, capture_calls, capture_outputs, error_accumulation
from .costs import costs
from .routing import coinciding_gates, confusion, layer_accuracy, layer_load, routing_by_task, token_choices
from .task_vectors import ZONES, LayerDeltas, Zones, layer_deltas, project_onto_zone, subspace_energy
from .variance import Recommendation, added_parameters, explained_variance, ranks_needed, recommend

__all__ = [
    "ZONES", "LayerDeltas", "ModelCall", "Recommendation", "Zones", "added_parameters", "blocks", "capture_calls",
    "capture_outputs", "coinciding_gates", "confusion", "costs", "error_accumulation", "explained_variance",
    "layer_accuracy", "layer_deltas", "layer_load", "project_onto_zone", "ranks_needed", "recommend",
    "routing_by_task", "subspace_energy", "token_choices",
]  # fmt: skip
