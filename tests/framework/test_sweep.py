"""Sweeps through the real command line: killed and resumed, on several processes, failed jobs, launchers, Optuna."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from command_line import ENVIRONMENT, Workplace, fusion_bench, image_pools, program, run_program

from fusion_bench_smile.leaderboard import gather
from fusion_bench_smile.reports import REPORT_FILE, RunReport
from smile_zoo.images import TASKS

pytestmark = pytest.mark.cli

SAMPLES = {"digits": 60, "flags": 15}  # enough to tell runs apart
EMBEDDED = ["modelpool=SmileEmbedded/gentle", "taskpool=SmileEmbedded/test"]
OTHERS = [f"~{place}.{task}" for task in TASKS[3:] for place in ("modelpool.models", "taskpool.test_datasets")]
TWO_PROCESSES = ["fabric.devices=2", "fabric.strategy=ddp", "fabric.accelerator=cpu"]


@pytest.fixture
def pools(tmp_path) -> list[str]:
    """Arguments that select two experts and a few samples of their tasks."""
    return image_pools(tmp_path, SAMPLES)


@pytest.fixture
def grid(pools) -> list[str]:
    """The command line of a grid."""
    return [*pools, "+experiment=smile_grid"]


def reports(folder: Path) -> dict[str, RunReport]:
    """Run folder → report."""
    return {file.parent.name: RunReport.read(file) for file in folder.rglob(REPORT_FILE)}


def points(folder: Path) -> dict[tuple[int, int], RunReport]:
    """(gate_k, k) → report."""
    return {(r.method["gate_k"], r.method["k"]): r for r in reports(folder).values()}


def killed(arguments: list[str], cwd: Path, after: int) -> None:
    """Start a sweep, and kill it and all its processes when so many reports lie there."""
    with (cwd / "killed.log").open("w") as log:
        sweep = subprocess.Popen(
            [*program("fusion_bench"), *arguments], cwd=cwd, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while len(list(cwd.rglob(REPORT_FILE))) < after:
            assert sweep.poll() is None, (cwd / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()


def swept(arguments: list[str], cwd: Path, code: int = 0, **options: bool) -> dict[tuple[int, int], RunReport]:
    completed = run_program("fusion_bench", *arguments, cwd=cwd, **options)
    assert completed.returncode == code, completed.stderr[-3000:]
    return points(cwd)


def resumed(arguments: list[str], cwd: Path, after: int, of: int, code: int = 0) -> dict[tuple[int, int], RunReport]:
    """A sweep that was killed when so many points were there, and started again."""
    killed(arguments, cwd, after)
    first = {file: file.stat().st_mtime_ns for file in cwd.rglob(REPORT_FILE)}
    assert after <= len(first) < of
    results = swept(arguments, cwd, code)
    assert all(file.stat().st_mtime_ns == before for file, before in first.items())  # nothing was run twice
    assert len(results) == len(reports(cwd)) == of
    return results


def test_a_killed_sweep_does_what_is_missing(grid, tmp_path):
    results = resumed(grid, tmp_path, after=5, of=12)
    assert set(results) == {(gate_k, k) for gate_k in (4, 8, 16) for k in (4, 8, 16, 32)}
    for report in results.values():
        assert report.status == "complete"
        assert {task: result.samples for task, result in report.tasks.items()} == SAMPLES
        assert report.environment.processes == 1
        assert report.config["method"]["k"] == report.method["k"]
        assert f"method.k={report.method['k']}" in report.overrides
        assert report.routing.experts == list(SAMPLES)
        for layer in report.routing.layers.values():
            assert sum(layer.load) == pytest.approx(1, abs=1e-4)
            assert 0 <= layer.entropy <= 1
    runs, skipped = gather([tmp_path])
    assert (len(runs), skipped) == (12, [])
    for folder in (run.folder for run in runs):
        assert {"config.yaml", "overrides.yaml", "program_report.json"} <= {file.name for file in folder.iterdir()}


def test_two_processes_resume_and_report_what_one_does(grid, tmp_path):
    """Also of jobs whose processes die: k=0 fails, is recorded, and the others go on."""
    sweep = [*grid, "method.gate_k=4"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = swept([*sweep, "method.k=4,8"], tmp_path / "one")
    two = resumed([*sweep, "method.k=4,0,8", *TWO_PROCESSES], tmp_path / "two", after=1, of=3, code=1)
    dead = two.pop((4, 0))
    assert dead.status == "failed"
    assert "k=0: an expert needs a rank" in dead.error
    assert set(one) == set(two)
    for point, report in two.items():
        assert report.environment.processes == 2
        same_run(report, one[point])


def same_run(report: RunReport, other: RunReport) -> None:
    assert report.status == other.status == "complete"
    assert report.tasks == other.tasks
    assert report.fingerprint == other.fingerprint
    assert (report.parameters, report.average) == (other.parameters, other.average)


@pytest.mark.exhaustive
def test_forks_do_what_real_processes_do(grid, tmp_path):
    """A sweep, its job, and the second process that Fabric launches for it: each starts its own interpreter."""
    sweep = [*grid, "method.gate_k=4", "method.k=8", *TWO_PROCESSES]
    for name in ("real", "forks"):
        (tmp_path / name).mkdir()
    real, forks = (swept(sweep, tmp_path / name, real=name == "real")[4, 8] for name in ("real", "forks"))
    same_run(real, forks)
    assert real.environment == forks.environment
    assert real.environment.processes == 2
    assert real.overrides == forks.overrides
    assert real.config == forks.config


def test_further_points_find_their_factors(tmp_path):
    workplace = Workplace(tmp_path)
    sweep = ["+experiment=smile_run", "method.k=4,16", "method.gate_k=2,8", "hydra.mode=MULTIRUN"]
    completed = workplace.run(*sweep)
    assert completed.returncode == 0, completed.stderr[-3000:]
    first, *later = re.findall(r"factor cache: (\d+) hits, (\d+) misses", completed.stdout + completed.stderr)
    assert first == ("0", "24")
    assert later == [("24", "0")] * 3
    again = workplace.run(*sweep)
    assert (again.stdout + again.stderr).count("is already complete") == 4
    assert len(reports(workplace.root)) == 4


def test_a_failed_job_is_recorded_and_the_others_go_on(grid, tmp_path):
    completed = fusion_bench(*grid, "method.gate_k=4", "method.k=4,0,8", cwd=tmp_path)
    assert completed.returncode != 0
    results = points(tmp_path)
    assert {point: report.status for point, report in results.items()} == {
        (4, 4): "complete",
        (4, 0): "failed",
        (4, 8): "complete",
    }
    assert "k=0: an expert needs a rank" in results[4, 0].error
    runs, skipped = gather([tmp_path])
    assert len(runs) == 2
    assert len(skipped) == 1
    assert skipped[0].reason.startswith("failed: ")
    assert "k=0: an expert needs a rank" in skipped[0].reason


def test_another_seed_is_another_run(pools, tmp_path):
    arguments = [*pools, "+experiment=smile_run", "method=simple_average"]
    assert fusion_bench(*arguments, cwd=tmp_path).returncode == 0
    assert fusion_bench(*arguments, "seed=1", cwd=tmp_path).returncode == 0
    assert {report.seed for report in reports(tmp_path).values()} == {0, 1}
    again = fusion_bench(*arguments, cwd=tmp_path)
    assert "is already complete" in again.stdout + again.stderr
    redone = fusion_bench(*arguments, "redo=true", cwd=tmp_path)
    assert "is already complete" not in redone.stdout + redone.stderr


def test_retention_against_the_individual_models(tmp_path):
    """The one run knows the other's report, and both are of one board."""
    arguments = ["-m", "+experiment=smile_run", "+smile_row=individual,task_arithmetic", *EMBEDDED, *OTHERS]
    completed = fusion_bench(*arguments, "individual=outputs/individual", "fast_dev_run=true", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-3000:]
    individual, merged = sorted(reports(tmp_path).values(), key=lambda report: report.kind)
    assert individual.kind == "individual"
    assert individual.parameters == 3 * individual.pretrained_parameters
    assert list(individual.tasks) == list(TASKS[:3])
    assert individual.benchmark == merged.benchmark == "SmileEmbedded/gentle · SmileEmbedded/test"
    assert merged.retention is None  # the report was looked for elsewhere


@pytest.mark.parametrize(("launcher", "values"), [("joblib", (4, 8)), ("submitit_local", (8,))])
def test_launchers(launcher, values, grid, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    chosen = f"method.k={','.join(map(str, values))}"
    sweep = [*grid, "method.gate_k=4", chosen, f"hydra/launcher={launcher}"]
    results = swept(sweep, tmp_path)
    assert {report.status for report in results.values()} == {"complete"}
    assert set(results) == {(4, k) for k in values}


def test_optuna_maximises_retention_within_the_budget(pools, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    study = [*pools, "+experiment=smile_optuna", "hydra.sweeper.n_trials=4", "method.k=choice(2, 64)", "budget=1.1"]

    def search() -> dict:
        completed = run_program("smile-sweep", *study, cwd=tmp_path)
        assert completed.returncode == 0, completed.stderr[-3000:]
        (file,) = tmp_path.rglob("optimization_results.yaml")
        return yaml.safe_load(file.read_text())

    best = search()
    results = points(tmp_path)
    assert 2 <= len(results) <= 4
    assert {report.parameter_ratio <= 1.1 for report in results.values()} == {True, False}
    for report in results.values():
        within = report.parameter_ratio <= 1.1
        assert report.objective == (
            report.average if within else pytest.approx(100 * (1 - report.parameter_ratio / 1.1))
        )
        assert (report.objective > 0) == within
    assert best["best_value"] == pytest.approx(max(report.objective for report in results.values()))
    winner = results[best["best_params"]["method.gate_k"], best["best_params"]["method.k"]]
    assert winner.objective == best["best_value"]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob(REPORT_FILE)}
    assert search() == best  # the same points again, and nothing is run
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob(REPORT_FILE)} == before


def test_a_misspelled_option_of_a_grid_is_named(grid, tmp_path):
    completed = fusion_bench(*grid, "method.gat_k=4", cwd=tmp_path)
    assert completed.returncode != 0
    assert "unknown option method.gat_k (did you mean 'gate_k'?)" in completed.stderr.strip().splitlines()[-1]


def test_an_expert_without_a_task_is_named(tmp_path):
    arguments = ["+experiment=smile_run", "method=smile_individual", EMBEDDED[0], "taskpool=SmileText/full"]
    completed = fusion_bench(*arguments, cwd=tmp_path)
    assert completed.returncode == 1
    assert "the task pool has no task of the expert 'digits'; its tasks are: sections" in completed.stderr
    assert "Traceback" not in completed.stderr
    (report,) = reports(tmp_path).values()
    assert report.status == "failed"
    assert report.error.startswith("the task pool has no task of the expert 'digits'")
