"""The paper's studies: where fine-tuning happens, what ranks keep, whether routers find the expert, how errors grow."""

from .accumulation import error_accumulation
from .routing import coinciding_gates, confusion, layer_accuracy, layer_load, routing_by_task
from .subspace import Zones, projected, subspace_energy
from .variance import Recommendation, explained_variance, ranks_needed, recommend

__all__ = [
    "Recommendation",
    "Zones",
    "coinciding_gates",
    "confusion",
    "error_accumulation",
    "explained_variance",
    "layer_accuracy",
    "layer_load",
    "projected",
    "ranks_needed",
    "recommend",
    "routing_by_task",
    "subspace_energy",
]
