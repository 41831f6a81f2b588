"""Boards: one table for each benchmark, with one row for each run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import pandas as pd

from ..exceptions import SmileError
from ..reports import TaskResult, average_of, retention_of
from .gather import Run
from .published import published_for

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
OPTIONS = ("gate_k", "k", "top_k")
ASCENDING = ("parameters", "bytes", "seconds", "memory", "method")  # sorted from small to large


@dataclass
class Board:
    """All runs of one benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        tasks: Names of the tasks, in the order of the task pool.
        table: One row for each run: ``method``, the scores of `tasks` in percent, `COLUMNS`, ``origin`` (``measured``
            or ``published``), ``kind`` (``individual`` or ``merged``), `OPTIONS`, ``device`` and ``folder``.
        notes: Remarks on the table.
    """

    benchmark: str
    tasks: list[str]
    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> pd.DataFrame:
        """The rows of measured runs."""
        return self.table[self.table["origin"] == MEASURED]


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
            table = table.query(where)
        except Exception as error:  # pandas raises many types
            raise SmileError(f"--where {where!r}: {error}; the columns are {', '.join(board.table.columns)}") from None
    if sort not in table.columns:
        raise SmileError(f"--sort {sort}: the columns are {', '.join(board.table.columns)}")
    ordered = table.sort_values(sort, ascending=sort in ASCENDING, na_position="last", kind="stable")
    measured = ordered["origin"] == MEASURED
    return Board(board.benchmark, board.tasks, pd.concat([ordered[measured], ordered[~measured]]), board.notes)


def pareto(table: pd.DataFrame, cost: str = "parameters", score: str = "average") -> pd.Series:
    """Whether each row is on the Pareto front of minimal cost and maximal score, the first of several equal rows.

    Rows with missing values are never on the front.
    """
    known = table[[cost, score]].dropna().sort_values([cost, score], ascending=[True, False])
    best = known[score].cummax().shift(fill_value=float("-inf"))
    front = known.index[known[score] > best]
    return pd.Series(table.index.isin(front), index=table.index)


def _board(benchmark: str, runs: list[Run], published: bool) -> Board:
    reference = max(runs, key=lambda run: len(run.report.tasks)).report
    tasks = list(reference.tasks)
    individual = next((run.report.tasks for run in runs if run.report.kind == "individual"), {})
    rows = [_row(run, individual) for run in runs]
    notes = []
    if any(list(run.report.tasks) != tasks for run in runs):
        notes.append("some runs lack tasks: their averages are not comparable")
    if any(run.report.kind == "individual" for run in runs):
        notes.append("the parameters of the individual models are those of all models together")
    results = published_for(reference.modelpool, tasks) if published else None
    if results is not None:
        rows += _reference_rows(results.table, results.individual)
        notes += [f"rows marked † are published, not measured here: {results.source}", results.smile]
    return Board(benchmark, tasks, _table(rows, tasks), notes)


def _table(rows: list[dict[str, object]], tasks: list[str]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    for column in [*tasks, *COLUMNS, *OPTIONS]:
        table[column] = pd.to_numeric(table[column]) if column in table else float("nan")
    leading = ["method", *tasks, *COLUMNS]
    return table[[*leading, *(column for column in table if column not in leading)]]


def _row(run: Run, individual: Mapping[str, TaskResult]) -> dict[str, object]:
    report = run.report
    retention = 100.0 if report.kind == "individual" else retention_of(report.tasks, individual)
    construction = report.construction if report.kind == "merged" else None
    options = {name: report.method.get(name) for name in OPTIONS}
    return {
        "method": report.label,
        **{name: task.score for name, task in report.tasks.items()},
        "average": average_of(report.tasks),
        "retention": report.retention if retention is None else retention,
        "parameters": report.parameter_ratio,
        "bytes": report.byte_ratio,
        "seconds": construction and construction.seconds,
        "memory": construction and construction.peak_megabytes,
        "throughput": report.samples_per_second,
        "origin": MEASURED,
        "kind": report.kind,
        **{name: float(value) if isinstance(value, (int, float)) else None for name, value in options.items()},
        "device": report.environment.accelerator,
        "folder": str(run.folder),
    }


def _reference_rows(table: pd.DataFrame, individual: str) -> list[dict[str, object]]:
    reference = float(table.loc[individual, "average"])
    return [
        {
            "method": f"{method} †",
            **{str(column): value for column, value in row.items()},
            "retention": 100 * row["average"] / reference,
            "origin": PUBLISHED,
            "kind": "individual" if method == individual else "merged",
        }
        for method, row in table.iterrows()
    ]
