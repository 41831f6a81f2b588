"""Read the reports in run folders, and say which can't be used, and why."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..report import FILE, ReportError, RunReport

STARTED = "overrides.yaml"  # Hydra writes it when a job begins


class Run(NamedTuple):
    """A complete run."""

    folder: Path
    report: RunReport


class Skipped(NamedTuple):
    """A run that can't be used."""

    folder: Path
    reason: str


class Gathered(NamedTuple):
    """What lies in some folders."""

    runs: list[Run]
    skipped: list[Skipped]


def gather(folders: Iterable[str | os.PathLike[str]]) -> Gathered:
    """Read all reports in and below some folders.

    Of several reports of one run (the same benchmark and configuration) the newest counts.

    Raises:
        ReportError: if a folder doesn't exist.
    """
    runs: dict[tuple[str, str], Run] = {}
    skipped = []
    for folder in sorted({found for root in folders for found in _run_folders(Path(root))}):
        try:
            report = RunReport.read(folder / FILE)
        except ReportError as error:
            skipped.append(Skipped(folder, str(error)))
            continue
        if report.status == "failed":
            skipped.append(Skipped(folder, f"failed: {report.error}"))
            continue
        if not report.tasks:
            skipped.append(Skipped(folder, "no task was evaluated"))
            continue
        key, run = (report.benchmark, report.fingerprint), Run(folder, report)
        other = runs.get(key)
        if other is None or other.report.finished < report.finished:
            runs[key], older = run, other
        else:
            older = run
        if older is not None:
            skipped.append(Skipped(older.folder, f"the same run as {runs[key].folder}, which is newer"))
    return Gathered(list(runs.values()), skipped)


def _run_folders(root: Path) -> Iterable[Path]:
    if not root.is_dir():
        raise ReportError(f"{root} is no folder: give the folders of runs, e.g. outputs")
    for folder, _, files in os.walk(root):
        if FILE in files or STARTED in files:
            yield Path(folder)
