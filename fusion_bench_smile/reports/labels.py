"""Default labels of methods in tables, derived from their configuration."""

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
    "fusion_bench_smile.SmileUpscalingAlgorithm": "SMILE (gate_k={gate_k}, k={k}{extensions})",
    "SmileUpscalingAlgorithm": "SMILE of the framework (gate_k={gate_k}, k={k})",
}


def label_of(method: Mapping[str, Any]) -> str:
    """The label of a method's configuration: an entry of `LABELS`, filled in; the class name for other methods."""
    target = str(method.get("_target_") or method.get("name") or "unknown")
    name = target.rsplit(".", 1)[-1]
    template = LABELS.get(target) or LABELS.get(name) or name
    options = dict.fromkeys(("scaling_factor", "gate_k", "k"), "?") | dict(method)
    if options["gate_k"] is None:
        options["gate_k"] = options["k"]
    return template.format_map(options | {"extensions": "".join(f", {part}" for part in _extensions(method))})


def _extensions(method: Mapping[str, Any]) -> Iterator[str]:
    """The options of SMILE that go beyond the paper."""
    scope = method.get("routing_scope") or "token"
    if method.get("calibration"):
        yield f"calibrated by {method['calibration']}"
    elif scope != "token":
        yield f"by {scope}"
    if (density := method.get("density")) is not None:
        yield f"{density:.3g} of the entries"
    if (ratio := method.get("param_ratio")) is not None:
        yield f"≤{ratio:g}×"
    if (ratio := method.get("byte_ratio")) is not None:
        yield f"≤{ratio:g}× bytes"
    if method.get("storage") in ("int8", "int4"):
        yield method["storage"]
