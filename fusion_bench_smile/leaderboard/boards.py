"""Boards: for each benchmark one table, with a row for each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import pandas as pd

from ..errors import SmileError
from ..report import RunReport, average_of, retention_of
from .gather import Run
from .published import published_for

MEASURED, PUBLISHED = "measured", "published"
COLUMNS = {
    "average": "mean of the tasks' scores, in %",
    "retention": "average in % of the individual models' average",
    "parameters": "relative to the pretrained model",
    "bytes": "of the parameters, relative to the pretrained model's",
    "seconds": "to construct the model",
    "memory": "peak while constructing, beyond what was held before, in MB; of the accelerator, if there is one",
    "throughput": "samples per second while evaluating",
}
ASCENDING = ("parameters", "bytes", "seconds", "memory", "method")  # what is better, or comes first, when smaller


@dataclass
class Board:
    """All runs of one benchmark.

    Attributes:
        tasks: column names, in the order of the task pool.
        table: columns ``method``, `tasks`, those of `COLUMNS`, ``origin`` (measured or published), ``kind``
            (individual or merged), ``gate_k``, ``k``, ``top_k``, ``device``, ``folder``.
        notes: what has to be known to read it.
    """

    benchmark: str
    tasks: list[str]
    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> pd.DataFrame:
        return self.table[self.table["origin"] == MEASURED]


def boards(runs: Iterable[Run], published: bool = True) -> list[Board]:
    """Group runs by benchmark, and put published results beside them.

    Retention is against the board's own individual models, wherever their run lies.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.report.benchmark, []).append(run)
    return [_board(name, groups[name], published) for name in sorted(groups)]


def arrange(
    board: Board,
    sort: str = "average",
    methods: Sequence[str] = (),
    where: str | None = None,
) -> Board:
    """Sort the rows of a board and choose among them.

    Args:
        sort: a column; the best comes first, published rows last.
        methods: patterns of the methods to keep, e.g. ``SMILE*``; none keeps all.
        where: a condition on columns as pandas' ``query`` reads it, e.g. ``parameters < 1.5 and gate_k == 16``.

    Raises:
        SmileError: for a column or condition that can't be.
    """
    table = board.table
    if methods:
        table = table[[any(fnmatch(name, pattern) for pattern in methods) for name in table["method"]]]
    if where:
        try:
            table = table.query(where)
        except Exception as error:  # pandas raises many kinds
            raise SmileError(f"--where {where!r}: {error}; the columns are {', '.join(board.table.columns)}") from None
    if sort not in table.columns:
        raise SmileError(f"--sort {sort}: the columns are {', '.join(board.table.columns)}")
    ordered = table.sort_values(sort, ascending=sort in ASCENDING, na_position="last", kind="stable")
    first = ordered["origin"] == MEASURED
    return Board(board.benchmark, board.tasks, pd.concat([ordered[first], ordered[~first]]), board.notes)


def pareto(table: pd.DataFrame, cost: str = "parameters", gain: str = "average") -> pd.Series:
    """Which rows are on the Pareto front: none is as cheap and better, or cheaper and as good."""
    known = table[[cost, gain]].dropna().sort_values([cost, gain], ascending=[True, False])
    best = known[gain].cummax().shift(fill_value=float("-inf"))
    front = known.index[known[gain] > best]
    return pd.Series(table.index.isin(front), index=table.index)


def _board(benchmark: str, runs: list[Run], published: bool) -> Board:
    fullest = max(runs, key=lambda run: len(run.report.tasks)).report
    tasks = list(fullest.tasks)
    own = next((run.report.tasks for run in runs if run.report.kind == "individual"), {})
    rows = []
    for run in runs:
        report = run.report
        retention = 100.0 if report.kind == "individual" else retention_of(report.tasks, own)
        rows.append(_row(run) | {"retention": report.retention if retention is None else retention})
    notes = []
    if any(list(run.report.tasks) != tasks for run in runs):
        notes.append("some runs don't have all tasks: their averages aren't comparable")
    if any(run.report.kind == "individual" for run in runs):
        notes.append("the individual models' parameters are all of theirs together")
    found = published_for(fullest.modelpool, tasks) if published else None
    if found is not None:
        rows += _reference_rows(found.table, found.individual)
        notes += [f"rows marked † are published, not measured here: {found.source}", found.smile]
    table = pd.DataFrame(rows)
    for column in [*tasks, *COLUMNS, "gate_k", "k", "top_k"]:
        table[column] = pd.to_numeric(table[column]) if column in table else float("nan")
    leading = ["method", *tasks, *COLUMNS]
    return Board(benchmark, tasks, table[[*leading, *(c for c in table if c not in leading)]], notes)


def _row(run: Run) -> dict[str, object]:
    report = run.report
    constructed = report.construction if report.kind == "merged" else None
    return {
        "method": report.label,
        **{name: task.score for name, task in report.tasks.items()},
        "average": average_of(report.tasks),
        "parameters": report.ratio,
        "bytes": report.byte_ratio,
        "seconds": constructed and constructed.seconds,
        "memory": constructed and constructed.peak_megabytes,
        "throughput": report.samples_per_second,
        "origin": MEASURED,
        "kind": report.kind,
        **{name: _number(report, name) for name in ("gate_k", "k", "top_k")},
        "device": report.environment.accelerator,
        "folder": str(run.folder),
    }


def _number(report: RunReport, option: str) -> float | None:
    value = report.method.get(option)
    return float(value) if isinstance(value, (int, float)) else None


def _reference_rows(table: pd.DataFrame, individual: str) -> list[dict[str, object]]:
    best = float(table.loc[individual, "average"])
    return [
        {
            "method": f"{method} †",
            **{str(column): value for column, value in row.items()},
            "retention": 100 * row["average"] / best,
            "origin": PUBLISHED,
            "kind": "individual" if method == individual else "merged",
        }
        for method, row in table.iterrows()
    ]
