"""What a run prints at its end: one table of the tasks, and what was built, how long it took, where the report is."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..reports import RunReport, TaskResult, retention_of


def print_summary(report: RunReport, file: Path, individual: Mapping[str, TaskResult], console: Console) -> None:
    """Print the scores of a complete run; retention of each task where the individual models' results are known."""
    console.print(tasks_table(report, individual))
    for line in summary_lines(report, file):
        console.print(Text(line), soft_wrap=True)


def tasks_table(report: RunReport, individual: Mapping[str, TaskResult]) -> Table:
    """Task, score and retention in percent, with the mean over all tasks in the last row."""
    table = Table(title=Text(f"{report.label}: {report.benchmark}"), title_justify="left")
    table.add_column("task")
    table.add_column("score", justify="right")
    table.add_column("retention", justify="right")
    for name, task in report.tasks.items():
        table.add_row(Text(name), _percent(task.score), _percent(retention_of({name: task}, individual)))
    table.add_section()
    table.add_row("average", _percent(report.average), _percent(report.retention))
    return table


def summary_lines(report: RunReport, file: Path) -> Iterator[str]:
    """Size of the model, times of construction and evaluation, and the next command."""
    parts = [] if report.parameters is None else [f"{report.parameters / 1e6:,.1f} M parameters"]
    parts += [] if report.parameter_ratio is None else [f"{report.parameter_ratio:.2f} × the pretrained model's"]
    if report.construction is not None:
        parts.append(f"built in {report.construction.seconds:.1f} s")
    if report.evaluation is not None:
        parts.append(f"evaluated in {report.evaluation.seconds:.1f} s")
    yield ", ".join(parts)
    yield f"report: {file}"
    yield f"next: smile-leaderboard {file.parent.parent}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
