"""Boards as tables: for the terminal, Markdown, CSV and LaTeX, and as a self-contained web page with charts."""

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from rich.table import Table
from rich.text import Text

from ..io.tables import escape_markdown, markdown_table
from ..io.text import printable
from .boards import COLUMNS, HEADINGS, MEASURED, PATH_LENGTH, Board, Skipped
from .figures import LARGEST, family, family_styles

TEMPLATE = Path(__file__).with_name("page.html")
DETAILS = ("folder", "device", "top_k")  # columns shown in the tooltip of a run
UNITS = {"parameters": "×", "bytes": "×"}
DIGITS = {"parameters": 2, "bytes": 2, "seconds": 2, "memory": 0, "throughput": 0}  # 1 for other columns
BYTE_TOLERANCE = 0.005  # byte ratios that differ less from the parameter ratio are not shown
# text that spreadsheets take for a formula, also in full width
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r\n]")
ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "{}&%$#_"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}"}
    | {"[": "{[}", "*": "{*}"}  # after the end of a row they are its options
    | {"λ": r"$\lambda$", "†": r"$^\dagger$", "×": r"$\times$"}
)


def shown_columns(board: Board) -> list[str]:
    """The tasks and the columns of `COLUMNS` that have values; ``bytes`` only where it differs from ``parameters``."""
    table = board.table
    known = [column for column in [*board.tasks, *COLUMNS] if table[column].notna().any()]
    redundant = not ((table["bytes"] - table["parameters"]).abs() > BYTE_TOLERANCE).any()
    return [column for column in known if column != "bytes" or not redundant]


def formatted(board: Board) -> pd.DataFrame:
    """The `shown_columns` as strings, one row for each run; missing values are empty strings."""
    text = {column: [_formatted_number(v, column) for v in board.table[column]] for column in shown_columns(board)}
    return pd.DataFrame(text, index=board.table.index)


def best_cells(board: Board) -> pd.DataFrame:
    """Whether each cell of `formatted` is the best of its column, as it is shown.

    Candidates are measured, merged models; columns are the tasks, ``average`` and ``retention``.
    """
    text = formatted(board)
    best = pd.DataFrame(False, index=text.index, columns=text.columns)
    candidates = board.table[(board.table["origin"] == MEASURED) & (board.table["kind"] == "merged")]
    for column in text.columns.intersection([*board.tasks, "average", "retention"]):
        known = candidates[column].dropna()
        if len(known) > 1:
            winners = known.index[text.loc[known.index, column] == text.at[known.idxmax(), column]]
            best.loc[winners, column] = True
    return best


def rich_table(board: Board, tasks: bool = True) -> Table:
    """The board as a table for the terminal, with or without the single tasks, the best cells in bold."""
    text, best = formatted(board), best_cells(board)
    text = text if tasks else text.drop(columns=board.tasks, errors="ignore")
    title, notes = Text(board.benchmark, style="table.title"), Text("; ".join(board.notes), style="table.caption")
    table = Table(title=title, caption=notes if notes else None, caption_justify="left")
    table.add_column("method", no_wrap=True)
    for column in text.columns:
        table.add_column(Text(HEADINGS.get(column, column)), justify="right")
    for row in text.index:
        cells = [Text(text.at[row, c], style="bold" if best.at[row, c] else "") for c in text.columns]
        style = "" if board.table.at[row, "origin"] == MEASURED else "dim"
        table.add_row(Text(str(board.table.at[row, "method"])), *cells, style=style)
    return table


def markdown(board: Board, title: bool = True) -> str:
    """The board as a Markdown table with its notes, optionally under its title, the best cells in bold."""
    text, best = formatted(board), best_cells(board)
    table = text.where(~best, "**" + text + "**")
    table.columns = [escape_markdown(HEADINGS.get(column, column)) for column in table.columns]
    table.insert(0, "method", board.table["method"].map(escape_markdown))
    heading = [f"## {escape_markdown(board.benchmark)}", ""] if title else []
    notes = [line for note in board.notes for line in ("", f"{note[0].upper()}{note[1:]}.")]
    return "\n".join([*heading, markdown_table(table), *notes, ""])


def csv(boards: list[Board]) -> str:
    """All boards as one CSV file with all columns, unrounded, and the column ``benchmark``.

    An apostrophe precedes text that spreadsheets would run as a formula.
    """
    table = pd.concat([board.table.assign(benchmark=board.benchmark) for board in boards], ignore_index=True)
    for column in table.select_dtypes(exclude="number"):
        table[column] = table[column].map(_without_formula)
    return table.rename(columns=_without_formula).to_csv(index=False)


def latex(board: Board) -> str:
    """The board as a LaTeX table for the package booktabs, the best cells in bold."""
    text, best = formatted(board), best_cells(board)
    escaped = text.map(_escape)
    table = escaped.where(~best, r"\textbf{" + escaped + "}")
    table.insert(0, "method", board.table["method"].astype(str).map(_escape))
    table.columns = [_escape(HEADINGS.get(column, column)) for column in table.columns]
    columns = "l" + "r" * (len(table.columns) - 1)
    return table.style.hide(axis="index").to_latex(hrules=True, caption=_escape(board.benchmark), column_format=columns)


def page(boards: Sequence[Board], skipped: Sequence[Skipped] = (), title: str = "Leaderboard") -> str:
    """Boards and the list of skipped runs as HTML; the page loads nothing from the network."""
    styles = family_styles(boards).items()
    data = {
        "families": {name: {"color": color, "marker": marker} for name, (color, marker) in styles},
        "boards": [_board_data(board) for board in boards],
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["printable"] = lambda text: printable(text, PATH_LENGTH)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, skipped=skipped, written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        # inside <script> only "<" could end the data
        data=jinja2.utils.markupsafe.Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    )  # fmt: skip


def _formatted_number(value: float, column: str) -> str:
    if pd.isna(value):
        return ""
    template = "{:.{}f}{}" if abs(value) < LARGEST else "{:.3g}{}"
    digits = [DIGITS.get(column, 1)] if abs(value) < LARGEST else []
    return template.format(value, *digits, UNITS.get(column, ""))


def _without_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _escape(text: str) -> str:
    return re.sub("-(?=-)", "-{}", text.translate(ESCAPES))  # two hyphens would be a dash


def _board_data(board: Board) -> dict[str, Any]:
    shown = sorted(shown_columns(board), key=board.tasks.__contains__)  # a phone shows the first columns only
    columns = [
        {
            "key": column, "heading": HEADINGS.get(column, column), "digits": DIGITS.get(column, 1),
            "unit": UNITS.get(column, ""), "help": COLUMNS.get(column, "score on this task, in %"),
        }
        for column in shown
    ]  # fmt: skip
    rows = [
        {
            "method": row["method"], "family": family(row["method"]), "origin": row["origin"], "kind": row["kind"],
            "values": {column: None if pd.isna(row[column]) else row[column] for column in shown},
            "details": {name: row[name] for name in DETAILS if name in row and pd.notna(row[name])},
        }
        for _, row in board.table.iterrows()
    ]  # fmt: skip
    published = [
        {key: None if pd.isna(value) else value for key, value in row.items()}
        for row in board.published_smile.to_dict("records")
    ]
    return {
        "benchmark": board.benchmark, "notes": board.notes, "columns": columns, "rows": rows, "published": published,
    }  # fmt: skip
