"""Discovery of run reports in folders, with a reason for each run that is skipped."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..reports import REPORT_FILE, ReportError, RunReport

OVERRIDES_FILE = "overrides.yaml"  # Hydra writes it at the start of a job


class Run(NamedTuple):
    """A complete run: its folder and report."""

    folder: Path
    report: RunReport


class Skipped(NamedTuple):
    """The folder of a run that the leaderboard leaves out, and the reason."""

    folder: Path
    reason: str


class Gathered(NamedTuple):
    """The complete runs in some folders, the newest of each configuration, and all others."""

    runs: list[Run]
    skipped: list[Skipped]


def gather(folders: Iterable[str | os.PathLike[str]]) -> Gathered:
    """Read all reports in some folders and their subfolders.

    The newest of several reports with the same benchmark and fingerprint is used.

    Raises:
        ReportError: If a folder does not exist.
    """
    runs: dict[tuple[str, str], Run] = {}
    skipped = []
    for folder in sorted({folder for root in folders for folder in _run_folders(Path(root))}):
        run = _read(folder)
        if isinstance(run, Skipped):
            skipped.append(run)
            continue
        key = (run.report.benchmark, run.report.fingerprint)
        other = runs.setdefault(key, run)
        if other is run:
            continue
        older, newer = (other, run) if other.report.finished < run.report.finished else (run, other)
        runs[key] = newer
        skipped.append(Skipped(older.folder, f"the same run as {newer.folder}, which is newer"))
    return Gathered(list(runs.values()), skipped)


def _read(folder: Path) -> Run | Skipped:
    try:
        report = RunReport.read(folder / REPORT_FILE)
    except ReportError as error:
        return Skipped(folder, str(error))
    if report.status == "failed":
        return Skipped(folder, f"failed: {report.error}")
    return Run(folder, report) if report.tasks else Skipped(folder, "no task was evaluated")


def _run_folders(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise ReportError(f"{root} is no folder: give the folders of runs, e.g. outputs")
    for folder, _, files in os.walk(root):
        if REPORT_FILE in files or OVERRIDES_FILE in files:
            yield Path(folder)
