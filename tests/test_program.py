"""The parts of a reporting run: what is measured, named and maximised."""

from __future__ import annotations

import subprocess

import pytest
import torch
from omegaconf import OmegaConf
from test_report import report

from fusion_bench_smile.errors import PlanError
from fusion_bench_smile.individual import own_task
from fusion_bench_smile.labels import label_of
from fusion_bench_smile.program import objective_of
from fusion_bench_smile.surroundings import Meter, environment, git_revision


def test_the_meter_sees_a_peak_that_is_gone():
    meter = Meter()
    block = torch.ones(50_000_000)  # 200 MB
    del block
    stage = meter.stop()
    assert stage.seconds > 0
    if stage.peak_host_bytes is None:
        pytest.skip("this system can't set the peak back")
    assert 190e6 < stage.peak_host_bytes < 400e6
    assert Meter().stop().peak_host_bytes < 50e6  # the former peak doesn't count any more


def test_the_environment_of_this_process():
    here = environment(torch.device("cpu"), 3)
    assert (here.processes, here.threads) == (3, torch.get_num_threads())
    assert here.accelerator.startswith("cpu (")
    assert here.packages["torch"] == torch.__version__.split("+")[0] or here.packages["torch"] == torch.__version__


def test_the_git_revision(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path / "missing") is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    git("tag", "v1")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


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


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ({"_target_": "fusion_bench.method.DummyAlgorithm"}, "pretrained"),
        ({"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.3}, "Task Arithmetic (λ=0.3)"),
        ({"_target_": "fusion_bench_smile.SmileUpscalingAlgorithm", "gate_k": 4, "k": -1}, "SMILE (gate_k=4, k=-1)"),
        (
            {
                "_target_": "fusion_bench_smile.SmileUpscalingAlgorithm",
                "gate_k": 4,
                "k": 8,
                "routing_scope": "two_pass",
            },
            "SMILE (gate_k=4, k=8, two-pass)",
        ),
        (
            {
                "_target_": "fusion_bench_smile.SmileUpscalingAlgorithm",
                "gate_k": 4,
                "k": 8,
                "calibration": 16,
                "routing_scope": "two_pass",
                "param_ratio": 1.25,
                "storage": "int8",
            },
            "SMILE (gate_k=4, k=8, calibrated by 16, ≤1.25×, int8)",
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


def test_the_task_of_an_expert():
    pool = OmegaConf.create({"_target_": "pool", "test_datasets": {"a": 1, "b": 2}, "fast_dev_run": True})
    OmegaConf.set_struct(pool, True)
    assert own_task(pool, "b") == {"_target_": "pool", "test_datasets": {"b": 2}, "fast_dev_run": True}
    assert set(pool.test_datasets) == {"a", "b"}
    assert own_task(OmegaConf.create({"tasks": {"a": 1}}), "a") == {"tasks": {"a": 1}}
    with pytest.raises(PlanError, match="no task of the expert 'c'; its tasks are: a, b"):
        own_task(pool, "c")
    with pytest.raises(PlanError, match="its tasks are: unknown"):
        own_task(OmegaConf.create({}), "c")
