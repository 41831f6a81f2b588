"""The report of a run: round trip, refusal of damaged files, and the scores derived from tasks."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start, succeed
from sample_reports import accuracies, report

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
        (lambda text: 100_000 * "[" + 100_000 * "]", "can't be read: maximum recursion depth"),
        (
            lambda text: text.replace('"parameters": 150', f'"parameters": {5000 * "1"}'),
            "can't be read: Exceeds the limit",
        ),
        (lambda text: text.replace('"parameters": 150', f'"parameters": {4000 * "1"}'), "parameters: "),
        (lambda text: text.replace('"score": 80.0', f'"score": {4000 * "1"}'), r"tasks\.a\.score"),
        (lambda text: text.replace('"parameters": 150', '"parameters": -1'), "parameters: .*greater than"),
        (lambda text: text.replace("00:00:00Z", "00:00:00"), "started: .*timezone"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": "\\n' + 99 * "x" + '"'),
            r"version is \\nx+…,",
        ),
        (lambda text: text.replace('"schema_version": 1', f'"schema_version": {900 * "["}{900 * "]"}'), "is no number"),
        (lambda text: text.replace('"label"', '"\\n\\u202e"'), "label: Field required"),
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


def test_what_is_no_regular_file_is_not_read(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    for name in ("folder", "loop", "zero", "pipe", "sparse"):
        with pytest.raises(ReportError, match="can't be read"):
            RunReport.read(tmp_path / name)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([10**400, -(10**30), "\ud800"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(RunReport.model_fields)), json_values)
def test_a_report_with_any_value_is_read_or_refused_in_one_line(tmp_path_factory, name, value):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(report().model_dump(mode="json") | {name: value}))
    message = ""
    try:
        RunReport.read(file)
    except ReportError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert len(message) < 500


def test_a_failed_report_needs_an_error():
    with pytest.raises(ValueError, match="a failed run has an error"):
        report(status="failed", tasks={})


def test_a_report_of_another_configuration_is_kept(tmp_path):
    report(average=1.0).write(tmp_path)
    report(average=2.0).write(tmp_path)  # the same configuration: replaced
    report(fingerprint="other").write(tmp_path)
    assert RunReport.read(tmp_path / "smile_report-abc.json").average == 2.0
    assert RunReport.read(tmp_path / REPORT_FILE).fingerprint == "other"


def test_a_kept_report_stays_in_its_folder(tmp_path):
    report(fingerprint="../../away").write(tmp_path / "a" / "b")
    report().write(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    kept = next((tmp_path / "a" / "b").glob("smile_report-*.json"))
    assert RunReport.read(kept).fingerprint == "../../away"


def fingerprints(folder: Path) -> set[str]:
    return {RunReport.read(file).fingerprint for file in folder.iterdir()}


def test_no_report_is_lost_where_processes_write_at_once(tmp_path):
    def write(number: int) -> None:
        for turn in range(5):
            report(fingerprint=f"{number}-{turn}").write(tmp_path)

    assert succeed([start(lambda number=number: write(number)) for number in range(6)])
    assert fingerprints(tmp_path) == {f"{number}-{turn}" for number in range(6) for turn in range(5)}
    assert all(file.name.startswith("smile_report") for file in tmp_path.iterdir())


def test_a_reader_always_finds_a_report(tmp_path):
    file = report().write(tmp_path)

    def write() -> None:
        for turn in range(200):
            report(fingerprint=f"{turn % 3}", benchmark=20_000 * "x").write(tmp_path)

    writer = start(write)
    seen = set()
    while (ended := os.waitpid(writer, os.WNOHANG)) == (0, 0):
        seen.add(RunReport.read(file).fingerprint)
    assert ended == (writer, 0)
    assert seen <= {"abc", "0", "1", "2"}
    assert len(seen) > 1


@pytest.mark.parametrize("place", ["file/run", "/proc/smile/run"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match=r"can't be written to .*run: .*: choose another folder, or make room$"):
        report().write(tmp_path / place)


def test_a_full_disk_leaves_the_previous_report(tmp_path):
    file = report().write(tmp_path)
    before = file.read_bytes()

    def write() -> None:  # no file may grow beyond 2 kB, so that writes fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(ReportError, match="can't be written"):
            report(tasks=accuracies(**{f"task {number}": 1.0 for number in range(99)})).write(tmp_path)

    assert succeed([start(write)])
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [REPORT_FILE]


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
            "infinite": {"loss": float("inf")},
            "model_info": {"all_params": 3},
            "average": {"accuracy": 0.1},
        }
    )
    assert set(results) == {"sun397", "glue-stsb", "glue-cola", "infinite"}
    assert results["infinite"].score is None
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


def test_scores_beyond_the_range_of_floats():
    huge = {name: TaskResult(metric="loss", score=1.7e308) for name in ("a", "b")}
    assert average_of(huge) is None
    tiny = {"a": TaskResult(metric="loss", score=5e-324)}
    assert retention_of({"a": TaskResult(metric="loss", score=80.0)}, tiny) is None


def test_the_json_is_valid_for_other_readers(tmp_path):
    text = report(average=None).write(tmp_path).read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["average"] is None


def test_the_fingerprint_ignores_the_order_of_options():
    assert fingerprint({"k": 8, "gate_k": 4}) == fingerprint({"gate_k": 4, "k": 8})
    assert fingerprint({"k": 8}) != fingerprint({"k": 16})
    assert len(fingerprint({})) == 12
