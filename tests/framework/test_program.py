"""The objective of a reported run."""

from __future__ import annotations

import pytest
from sample_reports import report

from fusion_bench_smile.framework import objective_of


@pytest.mark.parametrize(
    ("changes", "budget", "objective"),
    [
        ({}, None, 70),
        ({"retention": 90.0}, None, 90),
        ({"retention": 90.0}, 1.5, 90),
        ({"retention": 90.0}, 1.2, -25),
        ({"parameters": None}, 1.2, 70),
        ({"average": None}, 2.0, None),
    ],
)
def test_the_objective(changes, budget, objective):
    assert objective_of(report(**changes), budget) == (objective and pytest.approx(objective))


def test_any_model_within_the_budget_is_better_than_any_above():
    poor = report(retention=0.0, parameters=100)
    above = [report(retention=100.0, parameters=parameters) for parameters in (121, 150, 800)]
    values = [objective_of(each, 1.2) for each in (poor, *above)]
    assert values == sorted(values, reverse=True)
