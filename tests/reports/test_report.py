"""The report of a run: round trip, refusal of damaged files, and the scores derived from tasks."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_reports import report

from fusion_bench_smile.reports import (
    REPORT_FILE,
    ReportError,
    RunReport,
    TaskResult,
    average_of,
    fingerprint,
    retention_of,
    task_results,
)


def test_a_report_comes_back(tmp_path):
    file = report().write(tmp_path / "run")
    assert file == tmp_path / "run" / REPORT_FILE
    assert RunReport.read(file) == report()
    assert report().parameter_ratio == 1.5
    assert [f.name for f in file.parent.iterdir()] == [REPORT_FILE]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "can't be read"),
        (lambda text: "[]", "schema version is None"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 99'),
            "schema version is 99.*run it again",
        ),
        (lambda text: text.replace('"score": 80.0', '"score": "high"'), r"tasks\.a\.score"),
        (lambda text: text.replace('"score": 80.0', '"score": NaN'), r"tasks\.a\.score"),
        (lambda text: text.replace('"label"', '"lable"'), "label: Field required"),
        (lambda text: "\x00\x01", "can't be read"),
    ],
)
def test_a_damaged_report_is_refused(tmp_path, damage, reason):
    file = report().write(tmp_path)
    file.write_text(damage(file.read_text()))
    with pytest.raises(ReportError, match=reason):
        RunReport.read(file)


def test_a_missing_report_is_a_run_that_was_killed(tmp_path):
    with pytest.raises(ReportError, match="killed, or still goes on"):
        RunReport.read(tmp_path / REPORT_FILE)


def test_a_failed_report_needs_an_error():
    with pytest.raises(ValueError, match="a failed run has an error"):
        report(status="failed", tasks={})


def test_a_report_of_another_configuration_is_kept(tmp_path):
    report(average=1.0).write(tmp_path)
    report(average=2.0).write(tmp_path)  # the same configuration: replaced
    report(fingerprint="other").write(tmp_path)
    assert RunReport.read(tmp_path / "smile_report-abc.json").average == 2.0
    assert RunReport.read(tmp_path / REPORT_FILE).fingerprint == "other"


def test_an_interrupted_write_leaves_the_previous_report(tmp_path, monkeypatch):
    file = report().write(tmp_path)
    before = file.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        report(average=1.0).write(tmp_path)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [REPORT_FILE]


def test_tasks_of_the_frameworks_reports():
    results = task_results(
        {
            "sun397": {"accuracy": 0.75, "loss": 0.9},
            "glue-stsb": {"spearman_rho": float("nan"), "samples": 40},
            "glue-cola": 0.5,
            "model_info": {"all_params": 3},
            "average": {"accuracy": 0.1},
        }
    )
    assert set(results) == {"sun397", "glue-stsb", "glue-cola"}
    assert results["sun397"] == TaskResult(metric="accuracy", score=75, metrics={"accuracy": 0.75, "loss": 0.9})
    assert results["glue-stsb"] == TaskResult(
        metric="spearman_rho", score=None, samples=40, metrics={"spearman_rho": None}
    )
    assert (results["glue-cola"].metric, results["glue-cola"].score) == ("score", 0.5)


scores = st.dictionaries(st.text(min_size=1), st.floats(1, 100), min_size=1)


@settings(max_examples=30, deadline=None)
@given(scores)
def test_average_and_retention(values):
    tasks = {name: TaskResult(metric="accuracy", score=value) for name, value in values.items()}
    halves = {name: TaskResult(metric="accuracy", score=value / 2) for name, value in values.items()}
    assert average_of(tasks) == pytest.approx(sum(values.values()) / len(values))
    assert retention_of(halves, tasks) == pytest.approx(50)
    assert retention_of(tasks, tasks | {"more": TaskResult(metric="accuracy", score=0)}) == pytest.approx(100)
    assert retention_of(tasks, {}) is None
    undefined = tasks | {"undefined": TaskResult(metric="spearman_rho", score=None)}
    assert average_of(undefined) is None
    assert retention_of(undefined, undefined) is None


def test_the_json_is_valid_for_other_readers(tmp_path):
    text = report(average=None).write(tmp_path).read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["average"] is None


def test_the_fingerprint_ignores_the_order_of_options():
    assert fingerprint({"k": 8, "gate_k": 4}) == fingerprint({"gate_k": 4, "k": 8})
    assert fingerprint({"k": 8}) != fingerprint({"k": 16})
    assert len(fingerprint({})) == 12
