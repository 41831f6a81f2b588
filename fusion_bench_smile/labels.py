"""What a method is called in tables, if its run has no name of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    "fusion_bench_smile.SmileUpscalingAlgorithm": "SMILE (gate_k={gate_k}, k={k}{beyond})",
    "SmileUpscalingAlgorithm": "SMILE of the framework (gate_k={gate_k}, k={k})",
}


def label_of(method: Mapping[str, Any]) -> str:
    """The name of a method with these options, as its configuration gives them."""
    target = str(method.get("_target_") or method.get("name") or "unknown")
    name = target.rsplit(".", 1)[-1]
    label = LABELS.get(target) or LABELS.get(name) or name
    known = dict.fromkeys(("scaling_factor", "gate_k", "k"), "?") | dict(method)
    return label.format_map(known | {"beyond": "".join(f", {part}" for part in _beyond(method))})


def _beyond(method: Mapping[str, Any]) -> Iterator[str]:
    """Where our SMILE isn't the paper's."""
    scope, ratio = method.get("routing_scope") or "token", method.get("param_ratio")
    if method.get("calibration"):
        yield f"calibrated by {method['calibration']}"
    elif scope != "token":
        yield str(scope).replace("_", "-")
    if ratio is not None:
        yield f"≤{ratio:g}×"
    if method.get("storage") == "int8":
        yield "int8"
