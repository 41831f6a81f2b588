"""Results of runs of the framework's own program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_bench_smile.reports import ReportError, read_program_report

CONFIG = """
method: {_target_: fusion_bench.method.TaskArithmeticAlgorithm, scaling_factor: 0.3}
modelpool: {_target_: fusion_bench.modelpool.CLIPVisionModelPool, models: {a: x}}
taskpool: {_target_: fusion_bench.taskpool.CLIPVisionModelTaskPool}
seed: null
"""
HYDRA = "hydra: {runtime: {choices: {modelpool: CLIPVisionModelPool/some, taskpool: null}}}"
RESULTS = {"model_info": {"all_params": 7}, "a": {"accuracy": 0.5, "loss": 1.0}, "average": {"accuracy": 0.5}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "hydra.yaml").write_text(HYDRA)
    (tmp_path / "program_report.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_a_run_without_our_program_has_a_report(folder):
    report = read_program_report(folder)
    assert report.label == "Task Arithmetic (λ=0.3)"
    assert report.benchmark == "CLIPVisionModelPool/some · fusion_bench.taskpool.CLIPVisionModelTaskPool"
    assert {name: task.score for name, task in report.tasks.items()} == {"a": 50.0}
    assert (report.average, report.parameters, report.construction) == (50.0, 7, None)
    assert read_program_report(folder).fingerprint == report.fingerprint


@pytest.mark.parametrize("file", ["config.yaml", "hydra.yaml", "program_report.json"])
@pytest.mark.parametrize("content", [None, "{", "[1]", "\xff"])
def test_files_that_are_missing_or_damaged(folder, file, content):
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ReportError, match="the report of the framework's program can't be read") as error:
        read_program_report(folder)
    assert "\n" not in str(error.value)
