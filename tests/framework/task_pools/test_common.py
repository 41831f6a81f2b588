"""What task pools share: every example is evaluated once, in batches, and results come back in order."""

from __future__ import annotations

import random

from torch import nn

from fusion_bench_smile.framework.task_pools.common import evaluate_in_batches, model_info


def test_results_come_in_the_order_of_the_examples():
    order = random.Random(0).sample(range(10), 10)
    batches: list[list[int]] = []

    def square(indices):
        batches.append(list(indices))
        return [index**2 for index in indices]

    assert evaluate_in_batches(order, 4, square, task="squares") == [index**2 for index in range(10)]
    assert batches == [order[:4], order[4:8], order[8:]]


def test_a_fast_run_evaluates_one_batch():
    assert evaluate_in_batches(range(10), 4, list, task="numbers", fast_dev_run=True) == [0, 1, 2, 3]


def test_parameters_are_counted_as_the_framework_does():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert model_info(model, "small") == {
        "trainable_params": 6, "all_params": 8, "trainable_percentage": 0.75, "name": "small",
    }  # fmt: skip
