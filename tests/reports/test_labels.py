"""Default labels of methods."""

from __future__ import annotations

import pytest

from fusion_bench_smile.reports import label_of

SMILE = {"_target_": "fusion_bench_smile.SmileUpscalingAlgorithm", "gate_k": 4, "k": 8}


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ({"_target_": "fusion_bench.method.DummyAlgorithm"}, "pretrained"),
        ({"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.3}, "Task Arithmetic (λ=0.3)"),
        (SMILE | {"k": -1}, "SMILE (gate_k=4, k=-1)"),
        (SMILE | {"k": -1, "density": 0.02}, "SMILE (gate_k=4, k=-1, 0.02 of the entries)"),
        (SMILE | {"routing_scope": "input"}, "SMILE (gate_k=4, k=8, by input)"),
        (
            SMILE | {"calibration": 16, "routing_scope": "input", "param_ratio": 1.25, "storage": "int8"},
            "SMILE (gate_k=4, k=8, calibrated by 16, ≤1.25×, int8)",
        ),
        (
            SMILE | {"gate_k": None, "routing_scope": "input", "byte_ratio": 1.1, "storage": "int4"},
            "SMILE (gate_k=8, k=8, by input, ≤1.1× bytes, int4)",
        ),
        (
            {"_target_": "fusion_bench.method.SmileUpscalingAlgorithm", "gate_k": 4, "k": 8},
            "SMILE of the framework (gate_k=4, k=8)",
        ),
        ({"name": "clip_task_wise_adamerging"}, "AdaMerging (task-wise)"),
        ({"_target_": "some.where.NewAlgorithm"}, "NewAlgorithm"),
        ({}, "unknown"),
    ],
)
def test_labels(method, label):
    assert label_of(method) == label
