"""The objective of a reported run."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from conftest import experts_of, mlp
from omegaconf import OmegaConf
from sample_reports import report

from fusion_bench_smile import upscale
from fusion_bench_smile.framework import ReportingFusionProgram, objective_of
from fusion_bench_smile.framework.program import _write_task_report, method_options, unused_change
from fusion_bench_smile.reports import REPORT_FILE, ReportError, RunReport, label_of

CONFIG = Path(__file__).resolve().parents[2] / "config"


def test_a_failure_is_recorded_or_logged(tmp_path, caplog):
    """The error of the run is raised in any case, see `ReportingFusionProgram`."""
    entries = OmegaConf.create({"method": {"_target_": "some.Method"}, "modelpool": {"_target_": "some.Pool"}})
    program = ReportingFusionProgram(**entries, print_config=False)
    now, error = datetime.now(timezone.utc), RuntimeError("out of memory")
    program._record_failure(tmp_path / "run", now, error)
    assert RunReport.read(tmp_path / "run" / REPORT_FILE).error == "RuntimeError: out of memory"
    program._record_failure(tmp_path / "run" / REPORT_FILE / "below", now, error)
    assert "the report can't be written to" in caplog.text


def test_the_report_of_a_task_pool(tmp_path):
    _write_task_report({"a": {"accuracy": 0.5}}, tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {"a": {"accuracy": 0.5}}
    with pytest.raises(ReportError, match=r"report.json/x can't be written: (File exists|Not a directory): choose"):
        _write_task_report({}, tmp_path / "new" / "report.json" / "x")


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
