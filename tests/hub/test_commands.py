"""The commands of the README and the docs for the benchmarks on the hub, as written, on a local hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from command_line import REPOSITORY, fusion_bench, run_program, task_pool_report
from hub.data_sets import GLUE, IMAGE_SETS, TEST_EXAMPLES

from fusion_bench_smile.leaderboard import leaderboard
from fusion_bench_smile.reports import REPORT_FILE, RunReport

pytestmark = [pytest.mark.cli, pytest.mark.slow]

TWO_PROCESSES = ["fabric.devices=2", "fabric.strategy=ddp"]
IN_PROCESS = "taskpool.dataloader_kwargs.num_workers=0"  # a worker takes longer to start than to read nine images
ROWS = "individual,pretrained,simple_average,task_arithmetic,ties_merging,fisher,regmean,adamerging"
FEW_STEPS = ["+tuned.adamerging.max_steps=1", "+tuned.num_workers=0"]
CLIP = """fusion_bench method=smile_upscaling method.gate_k=16 method.k=32
  modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 taskpool=SmileCLIP/TA8
  merged_model_save_path=outputs/smile-vit-b32"""
GLUE_LORA = (
    "fusion_bench method=smile_upscaling modelpool=Seq2SeqLMPool/flan-t5-base_glue_lora16 taskpool=SmileGLUE/flan-t5"
)


def run(command: str, *further: str, cwd: Path) -> None:
    """Run a command of the README or the docs, which have it as it is, with further arguments."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    assert any(plain(command) in plain(page.read_text()) for page in pages), command
    command = command.replace("$rows", ROWS)
    completed = fusion_bench(*shlex.split(command)[1:], *further, "fabric.accelerator=cpu", cwd=cwd)
    assert completed.returncode == 0, completed.stderr[-3000:]


def plain(text: str) -> str:
    """A text without line breaks."""
    return re.sub(r"[\\\s]+", " ", text)


def scores(report: dict, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The results of the tasks, all of whose examples were counted once."""
    assert all(report[task]["samples"] == TEST_EXAMPLES for task in tasks)
    return {task: report[task] for task in tasks}


def test_clip_on_one_and_two_processes_and_reloaded(hub, tmp_path, record_property):
    results = []
    for name, processes in {"one": [], "two": TWO_PROCESSES}.items():
        (tmp_path / name).mkdir()
        run(CLIP, IN_PROCESS, *processes, cwd=tmp_path / name)
        results.append(scores(task_pool_report(tmp_path / name), tuple(IMAGE_SETS)))
    assert results[0] == results[1]
    record_property("pool", "CLIPVisionModelPool/clip-vit-base-patch32_TA8")
    record_property("two processes", "yes")
    (tmp_path / "one" / "outputs").rename(tmp_path / "outputs")
    again = "fusion_bench method=dummy modelpool=SmileCheckpoint/clip modelpool.path=outputs/smile-vit-b32 taskpool="
    run(again, "taskpool=SmileCLIP/TA8", IN_PROCESS, "path.log_dir=again", cwd=tmp_path)
    assert scores(task_pool_report(tmp_path / "again"), tuple(IMAGE_SETS)) == results[0]


def test_projection_merging_has_published_rows(hub, tmp_path):
    command = "fusion_bench +experiment=smile_run method=smile_analysis/projection_merging "
    command += "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 taskpool=SmileCLIP/TA8"
    run(command, IN_PROCESS, cwd=tmp_path)
    (file,) = tmp_path.rglob("projection_merging.csv")
    table = pd.read_csv(file, index_col=0)
    measured = [name for name in table.index if not name.endswith("†")]
    assert [name for name in table.index if name.endswith("†")] == [f"{name} †" for name in measured]
    assert set(table.columns) == {*IMAGE_SETS, "average"}
    assert not table.isna().any(axis=None)


def test_glue_on_one_and_two_processes(hub, tmp_path, record_property):
    results = []
    for name, processes in {"one": [], "two": TWO_PROCESSES}.items():
        (tmp_path / name).mkdir()
        run(GLUE_LORA, *processes, cwd=tmp_path / name)
        results.append(scores(task_pool_report(tmp_path / name), tuple(f"glue-{task}" for task in GLUE)))
    assert results[0] == results[1]
    assert any(result.get("accuracy", 0) > 0 for result in results[0].values())
    record_property("pool", "Seq2SeqLMPool/flan-t5-base_glue_lora16")
    record_property("two processes", "yes")


def test_clip_equals_the_framework_and_has_published_results(hub, tmp_path):
    run(
        "fusion_bench -m +experiment=smile_clip/b32 +smile_row=smile_framework,smile ++method.gate_k=16 ++method.k=32",
        IN_PROCESS, cwd=tmp_path,
    )  # fmt: skip
    ours, theirs = reports_of(tmp_path, "SMILE (gate_k=16, k=32)", "SMILE of the framework (gate_k=16, k=32)")
    assert {name: task.score for name, task in ours.tasks.items()} == {
        name: task.score for name, task in theirs.tasks.items()
    }
    assert ours.parameters < theirs.parameters
    (board,), _ = leaderboard([tmp_path / "outputs"])
    assert board.tasks == list(IMAGE_SETS)
    assert sum("†" in str(label) for label in board.table.iloc[:, 0]) > 3


def test_all_rows_of_clip(hub, tmp_path):
    command = "fusion_bench -m +experiment=smile_clip/b32 +smile_row=$rows"
    run(command, IN_PROCESS, *FEW_STEPS, cwd=tmp_path)
    reports = {report.overrides[1].split("=")[1]: report for report in map(RunReport.read, tmp_path.rglob(REPORT_FILE))}
    assert sorted(reports) == sorted(ROWS.split(","))
    assert {report.status for report in reports.values()} == {"complete"}
    assert {tuple(report.tasks) for report in reports.values()} == {tuple(IMAGE_SETS)}


def test_a_grid_of_clip(hub, tmp_path):
    command = """fusion_bench +experiment=smile_grid study=clip-b32 benchmark="'CLIP-ViT-B/32, eight tasks'"
      modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 taskpool=SmileCLIP/TA8"""
    run(command, IN_PROCESS, "method.gate_k=4", "method.k=4,8", cwd=tmp_path)
    reports = [RunReport.read(file) for file in tmp_path.rglob(REPORT_FILE)]
    assert sorted(report.method["k"] for report in reports) == [4, 8]
    assert {report.benchmark for report in reports} == {"CLIP-ViT-B/32, eight tasks"}


@pytest.mark.parametrize("experiment", ["smile_clip/b16", "smile_clip/l14", "smile_glue/full"])
def test_experiments_of_other_models(experiment, hub, tmp_path):
    further = [IN_PROCESS] if "clip" in experiment else []
    completed = fusion_bench(
        f"+experiment={experiment}", "+smile_row=smile", *further, "fabric.accelerator=cpu", cwd=tmp_path
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    (file,) = tmp_path.rglob(REPORT_FILE)
    assert len(RunReport.read(file).tasks) == 8


def test_glue_rows_equal_the_framework(hub, tmp_path):
    run(
        "fusion_bench -m +experiment=smile_glue/lora "
        "+smile_row=individual,pretrained,simple_average,task_arithmetic,ties_merging",
        cwd=tmp_path,
    )  # fmt: skip
    command = "fusion_bench -m +experiment=smile_glue/lora +smile_row=smile_framework,smile"
    run(command, "++method.gate_k=4", "++method.k=16", cwd=tmp_path)
    ours, theirs = reports_of(tmp_path, "SMILE (gate_k=4, k=16)", "SMILE of the framework (gate_k=4, k=16)")
    for task, result in ours.tasks.items():
        assert result.score == pytest.approx(theirs.tasks[task].score), task
    assert ours.retention is not None
    completed = run_program("smile-leaderboard", "outputs", "--output", "leaderboard", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    table = (tmp_path / "leaderboard" / "leaderboard.md").read_text()
    assert all(label in table for label in ("individual", "pretrained", "simple average", "Task Arithmetic", "TIES"))


def reports_of(folder: Path, *labels: str) -> list[RunReport]:
    """The reports of runs with given labels below a folder."""
    reports = {report.label: report for report in map(RunReport.read, folder.rglob(REPORT_FILE))}
    return [reports[label] for label in labels]
