"""Boards: one table for each benchmark, with one row for each run that is found in some folders."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ..exceptions import SmileError
from ..io.text import printable
from ..reports import (
    PROGRAM_REPORT_FILE,
    REPORT_FILE,
    ReportError,
    RunReport,
    TaskResult,
    average_of,
    read_program_report,
    retention_of,
)
from .published import OPTIONS, Published, published_for

OVERRIDES_FILE = "overrides.yaml"  # Hydra writes it at the start of a job
MEASURED, PUBLISHED = "measured", "published"
COLUMNS = {
    "average": "mean score of the tasks, in %",
    "retention": "average in % of the individual models' average",
    "parameters": "number of parameters relative to the pretrained model",
    "bytes": "size of the parameters relative to the pretrained model",
    "seconds": "construction time of the model",
    "memory": "peak memory of the construction beyond the memory held at its start, in MB; device memory on a GPU",
    "throughput": "samples per second during evaluation",
}
HEADINGS = {"memory": "memory (MB)", "throughput": "samples/s"}  # where they differ from the names of the columns
# columns that are no tasks, and their headings
RESERVED = {"benchmark", "method", *COLUMNS, *HEADINGS.values(), "origin", "kind", *OPTIONS, "device", "folder"}
PATH_LENGTH = 4096  # characters
ASCENDING = ("parameters", "bytes", "seconds", "memory", "method")  # sorted from small to large


class Run(NamedTuple):
    """A complete run: its folder and report."""

    folder: Path
    report: RunReport


class Skipped(NamedTuple):
    """The folder of a run that the leaderboard leaves out, and the reason."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        """Folder and reason in one line."""
        return f"{printable(self.folder, PATH_LENGTH)}: {printable(self.reason, 2 * PATH_LENGTH)}"


class Gathered(NamedTuple):
    """The complete runs in some folders, the newest of each configuration, and all others."""

    runs: list[Run]
    skipped: list[Skipped]


@dataclass
class Board:
    """All runs of one benchmark. All text is in one line of printable characters, see `printable`."""

    benchmark: str
    tasks: list[str]  # their columns, see `task_columns`, in the order of the task pool
    # one row for each run: ``method``, the scores of `tasks` in percent, `COLUMNS`, ``origin`` (``measured`` or
    # ``published``), ``kind`` (``individual`` or ``merged``), `OPTIONS`, ``device`` and ``folder``
    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)  # remarks on the table
    # further published results of SMILE, in figures alone: ``method``, ``parameters``, ``average``, ``retention``
    published_smile: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def measured(self) -> pd.DataFrame:
        """The rows of measured runs."""
        return self.table[self.table["origin"] == MEASURED]


def gather(folders: Iterable[str | os.PathLike[str]]) -> Gathered:
    """Read all reports in some folders and their subfolders, also while runs write them.

    The newest of several reports with the same benchmark and fingerprint is used.
    Raises ReportError if a folder does not exist.
    """
    runs: dict[tuple[str, str], Run] = {}
    skipped = []
    for folder in sorted({folder for root in folders for folder in _run_folders(Path(root))}):
        run = _read(folder)
        if isinstance(run, Skipped):
            skipped.append(run)
            continue
        key = (run.report.benchmark, run.report.fingerprint)
        older, runs[key] = sorted((run, runs.get(key, run)), key=lambda each: each.report.finished)
        if older is not runs[key]:
            skipped.append(Skipped(older.folder, f"the same run as {runs[key].folder}, which is newer"))
    return Gathered(list(runs.values()), skipped)


def boards(runs: Iterable[Run], published: bool = True) -> list[Board]:
    """One board for each benchmark of some runs, sorted by name.

    Retention refers to the individual models of the same benchmark. Published results are appended as reference rows.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.report.benchmark, []).append(run)
    return [_board(name, groups[name], published) for name in sorted(groups)]


def arrange(board: Board, sort: str = "average", methods: Sequence[str] = (), where: str | None = None) -> Board:
    """A board with sorted and filtered rows.

    Args:
        sort: A column; the best row comes first, published rows last.
        methods: Glob patterns of the methods to keep, e.g. ``SMILE*``; an empty sequence keeps all.
        where: A condition for `pandas.DataFrame.query`, e.g. ``parameters < 1.5 and gate_k == 16``.

    Raises:
        SmileError: For an unknown column or an invalid condition.
    """
    table = board.table
    if methods:
        table = table[[any(fnmatch(name, pattern) for pattern in methods) for name in table["method"]]]
    if where:
        try:
            # a column with an odd name must not spoil a condition that does not mention it
            mentioned = [column for column in table.columns if column in where]
            table = table.loc[table[mentioned].query(where).index]
        except Exception as error:  # pandas raises many types
            raise SmileError(f"--where {where!r}: {error}; the columns are {', '.join(board.table.columns)}") from None
    if sort not in table.columns:
        raise SmileError(f"--sort {sort}: the columns are {', '.join(board.table.columns)}")
    ordered = table.sort_values(sort, ascending=sort in ASCENDING, kind="stable").sort_values("origin", kind="stable")
    return replace(board, table=ordered)


def pareto(table: pd.DataFrame, cost: str = "parameters", score: str = "average") -> pd.Series:
    """Whether each row, if complete, is on the front of minimal cost and maximal score: the first of equal rows."""
    known = table[[cost, score]].dropna().sort_values([cost, score], ascending=[True, False])
    best = known[score].cummax().shift(fill_value=float("-inf"))
    return pd.Series(table.index.isin(known.index[known[score] > best]), index=table.index)


def _read(folder: Path) -> Run | Skipped:
    ours = (folder / REPORT_FILE).exists() or not (folder / PROGRAM_REPORT_FILE).exists()
    try:
        report = RunReport.read(folder / REPORT_FILE) if ours else read_program_report(folder)
    except ReportError as error:
        return Skipped(folder, str(error))
    if report.status == "failed":
        return Skipped(folder, f"failed: {printable(report.error)}")
    return Run(folder, report) if report.tasks else Skipped(folder, "no task was evaluated")


def task_columns(tasks: Iterable[str]) -> dict[str, str]:
    """Task → its column in a board: the name in one line, which is not empty and not that of another column."""
    columns: dict[str, str] = {}
    taken = set(RESERVED)
    for task in dict.fromkeys(tasks):
        name = printable(task).strip() or "(unnamed)"
        name = f"{name} (task)" if name in RESERVED else name
        numbered = (f"{name} ({number})" for number in count(2))
        columns[task] = name = name if name not in taken else next(each for each in numbered if each not in taken)
        taken.add(name)
    return columns


def _run_folders(root: Path) -> Iterator[Path]:
    if not os.path.isdir(root):
        raise ReportError(f"{root} is no folder: give the folders of runs, e.g. outputs")
    folders = [root]
    while folders:  # os.walk calls itself in each subfolder before Python 3.12
        folder, names = folders.pop(), set()
        with suppress(OSError), os.scandir(folder) as entries:  # it may be deleted, or not be readable
            for entry in entries:
                names.add(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
        if names & {REPORT_FILE, PROGRAM_REPORT_FILE, OVERRIDES_FILE}:
            yield folder


def _board(benchmark: str, runs: list[Run], published: bool) -> Board:
    reference = max(runs, key=lambda run: len(run.report.tasks)).report
    tasks = list(reference.tasks)
    columns = task_columns([*tasks, *(task for run in runs for task in run.report.tasks)])
    individual = [run.report.tasks for run in runs if run.report.kind == "individual"]
    rows = [_row(run, individual, columns) for run in runs]
    notes, published_smile = [], pd.DataFrame()
    if any(list(run.report.tasks) != tasks for run in runs):
        notes.append("some runs lack tasks: their averages are not comparable")
    if individual:
        notes.append("the parameters of the individual models are those of all models together")
    results = published_for(reference.modelpool, tasks) if published else None
    if results is not None:
        rows += _reference_rows(results, columns)
        published_smile = _published_smile(results)
        notes += [f"rows marked † are published, not measured here: {results.source}"]
        notes += [results.note] if len(published_smile) else []
    table = pd.DataFrame(rows)
    shown = [columns[task] for task in tasks]
    table = table.reindex(columns=list(dict.fromkeys(["method", *shown, *COLUMNS, *table])))
    numbers = {*columns.values(), *COLUMNS, *OPTIONS}
    table = pd.DataFrame({name: pd.to_numeric(table[name]) if name in numbers else table[name] for name in table})
    return Board(printable(benchmark), shown, table, notes, published_smile)


def _row(run: Run, individual: Sequence[Mapping[str, TaskResult]], columns: Mapping[str, str]) -> dict[str, object]:
    report = run.report
    # the first individual models that have all scores
    known = (retention_of(report.tasks, tasks) for tasks in individual)
    retention = 100.0 if report.kind == "individual" else next((r for r in known if r is not None), report.retention)
    construction = report.construction if report.kind == "merged" else None
    return {
        "method": printable(report.label), **{columns[name]: task.score for name, task in report.tasks.items()},
        "average": average_of(report.tasks), "retention": retention,
        "parameters": report.parameter_ratio, "bytes": report.byte_ratio,
        "seconds": construction and construction.seconds, "memory": construction and construction.peak_megabytes,
        "throughput": report.samples_per_second, "origin": MEASURED, "kind": report.kind,
        **{name: _finite_number(report.method.get(name)) for name in OPTIONS},
        "device": printable(report.environment.accelerator), "folder": printable(run.folder, PATH_LENGTH),
    }  # fmt: skip


def _finite_number(value: Any) -> float | None:
    """A number of a method's options; None for other values, infinity and numbers beyond the range of floats."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _reference_rows(results: Published, columns: Mapping[str, str]) -> list[dict[str, object]]:
    """The published rows of a table: other methods, and a selection of SMILE."""
    default = results.smile[results.smile["default"]] if len(results.smile) else results.smile
    rows = pd.concat([results.table, default]).drop(columns="default", errors="ignore")
    rows = rows.assign(
        method=rows.index + " †", retention=_published_retention(results, rows), origin=PUBLISHED, kind="merged"
    )
    if results.individual is not None:
        rows.loc[results.individual, "kind"] = "individual"
    return rows.rename(columns=dict(columns)).to_dict("records")


def _published_smile(results: Published) -> pd.DataFrame:
    """All published results of SMILE; empty without any."""
    smile = results.smile
    if not len(smile):
        return smile
    values = smile[["parameters", "average"]].assign(retention=_published_retention(results, smile))
    return values.reset_index()


def _published_retention(results: Published, rows: pd.DataFrame) -> pd.Series:
    """Averages in percent of the published average of the individual models; NaN where that is unknown."""
    individual = float("nan") if results.individual is None else results.table.at[results.individual, "average"]
    return 100 * rows["average"] / individual
