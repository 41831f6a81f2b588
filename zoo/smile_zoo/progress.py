"""Progress of a comparison: its jobs and their results, from the files that they write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fusion_bench_smile.leaderboard import OVERRIDES_FILE
from fusion_bench_smile.reports import REPORT_FILE, ReportError, RunReport

SECONDS = 1.0  # between two looks at the files


class Job(NamedTuple):
    """A job that has started."""

    name: str  # its folder; once it is complete benchmark and label
    result: str  # empty while it runs


def started_jobs(outputs: Path) -> list[Job]:
    """The jobs in a folder of outputs, in the order of their start."""
    files = [(file.stat().st_mtime, file) for file in outputs.rglob(OVERRIDES_FILE)] if outputs.exists() else []
    return [_job(file.parent) for _, file in sorted(files)]


def _job(folder: Path) -> Job:
    try:
        report = RunReport.read(folder / REPORT_FILE)
    except ReportError:
        return Job(f"{folder.parent.name}: {folder.name}", "")
    name, seconds = f"{report.benchmark}: {report.label}", (report.finished - report.started).total_seconds()
    score = "failed" if report.average is None else f"{report.average:.1f} %"
    return Job(name, f"{score}, {seconds:.0f} s")


def progress_table(jobs: list[Job], total: int) -> Table:
    """The jobs with their results; those that run are marked."""
    complete = sum(bool(job.result) for job in jobs)
    table = Table(title=f"{complete} of {total} jobs complete", title_justify="left", box=None)
    table.add_column("job")
    table.add_column("average, time", justify="right")
    for job in jobs:
        table.add_row(Text(job.name), Text(job.result or "running …", style="" if job.result else "yellow"))
    return table


@contextmanager
def shown_progress(outputs: Path, total: int, console: Console) -> Iterator[None]:
    """Show the jobs of a ``with`` block: a live table in a terminal, otherwise a line for each complete job."""
    ended = threading.Event()
    watch = _watch_live if console.is_terminal else _watch_in_lines
    watcher = threading.Thread(target=watch, args=(outputs, total, console, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch_live(outputs: Path, total: int, console: Console, ended: threading.Event) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while not ended.wait(SECONDS):
            live.update(progress_table(started_jobs(outputs), total), refresh=True)
        live.update(progress_table(started_jobs(outputs), total), refresh=True)


def _watch_in_lines(outputs: Path, total: int, console: Console, ended: threading.Event) -> None:
    printed: set[str] = set()
    while True:
        has_ended = ended.wait(SECONDS)
        for job in started_jobs(outputs):
            if job.result and job.name not in printed:
                printed.add(job.name)
                console.print(Text(f"{len(printed)} of {total}: {job.name}: {job.result}"), soft_wrap=True)
        if has_ended:
            return
