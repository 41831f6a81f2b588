"""What a method is called in tables, if its run has no name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LABELS = {
    "DummyAlgorithm": "pretrained",
    "IndividualModelsAlgorithm": "individual",
    "SimpleAverageAlgorithm": "simple average",
    "TaskArithmeticAlgorithm": "Task Arithmetic (λ={scaling_factor})",
    "TiesMergingAlgorithm": "TIES (λ={scaling_factor})",
    "FisherMergingForCLIPVisionModel": "Fisher",
    "RegMeanAlgorithmForCLIP": "RegMean",
    "clip_layer_wise_adamerging": "AdaMerging (layer-wise)",
    "clip_task_wise_adamerging": "AdaMerging (task-wise)",
    "FlanT5LayerWiseAdaMergingAlgorithm": "AdaMerging (layer-wise)",
    "fusion_bench_smile.SmileUpscalingAlgorithm": "SMILE (gate_k={gate_k}, k={k})",
    "SmileUpscalingAlgorithm": "SMILE of the framework (gate_k={gate_k}, k={k})",
}


def label_of(method: Mapping[str, Any]) -> str:
    """The name of a method with these options, as its configuration gives them."""
    target = str(method.get("_target_") or method.get("name") or "unknown")
    name = target.rsplit(".", 1)[-1]
    label = LABELS.get(target) or LABELS.get(name) or name
    return label.format_map(dict.fromkeys(("scaling_factor", "gate_k", "k"), "?") | dict(method))
