"""The objective of a reported run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import experts_of, mlp
from omegaconf import OmegaConf
from sample_reports import report

from fusion_bench_smile import upscale
from fusion_bench_smile.framework import objective_of
from fusion_bench_smile.framework.program import method_options, unused_change
from fusion_bench_smile.reports import RunReport, label_of

CONFIG = Path(__file__).resolve().parents[2] / "config"


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


def test_what_an_upscaled_model_does_not_use_is_reported(tmp_path):
    base = mlp()
    found = unused_change(upscale(base, experts_of(base, 2), gate_k=2, k=4))
    assert found is not None
    assert 0 < found.share < 0.5
    assert found.largest.keys() == {"1.weight", "1.bias"}
    assert RunReport.read(report(unused_change=found.model_dump()).write(tmp_path)).unused_change == found
    assert unused_change(base) is None
    assert report().unused_change is None


def test_reports_have_one_name_for_each_option():
    config = OmegaConf.load(CONFIG / "method" / "smile_upscaling.yaml")
    config.factor_cache = None
    own, foreign = config.copy(), config.copy()
    own.k, own.gate_k, own.save_with_remote_code = 64, 8, True
    foreign.rank_of_expert, foreign.rank_of_router = 64, 8
    options = [method_options(OmegaConf.to_container(each)) for each in (own, foreign)]
    assert options[0] == options[1]
    assert label_of(options[1]) == "SMILE (gate_k=8, k=64)"
    other = {"_target_": "fusion_bench.method.Other", "rank_of_expert": 3}
    assert method_options(other) == other
