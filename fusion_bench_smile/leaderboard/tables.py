"""Boards as text: for the terminal, Markdown, CSV and LaTeX."""

from __future__ import annotations

import pandas as pd
from rich.table import Table
from rich.text import Text

from .boards import COLUMNS, MEASURED, Board

UNITS = {"parameters": "×", "bytes": "×"}
DIGITS = {"parameters": 2, "bytes": 2, "seconds": 2, "memory": 0, "throughput": 0}  # others have one
HEADINGS = {"memory": "memory (MB)", "throughput": "samples/s"}
ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "{}&%$#_"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"λ": r"$\lambda$", "†": r"$^\dagger$", "×": r"$\times$"}
)


def shown_columns(board: Board) -> list[str]:
    """Tasks and measures of which anything is known; bytes where they aren't the parameters over again."""
    table = board.table
    known = [column for column in [*board.tasks, *COLUMNS] if table[column].notna().any()]
    same = not ((table["bytes"] - table["parameters"]).abs() > 0.005).any()
    return [column for column in known if column != "bytes" or not same]


def formatted(board: Board) -> pd.DataFrame:
    """The board as text, one row for each run, empty where nothing is known."""
    text = pd.DataFrame(index=board.table.index)
    for column in shown_columns(board):
        unit = UNITS.get(column, "")
        digits = DIGITS.get(column, 1)
        text[column] = ["" if pd.isna(v) else f"{v:.{digits}f}{unit}" for v in board.table[column]]
    return text


def best_cells(board: Board) -> pd.DataFrame:
    """Which cells of `formatted` are the best of their column, among measured methods that give one model."""
    text = formatted(board)
    best = pd.DataFrame(False, index=text.index, columns=text.columns)
    rows = board.table[(board.table["origin"] == MEASURED) & (board.table["kind"] == "merged")]
    for column in text.columns.intersection([*board.tasks, "average", "retention"]):
        known = rows[column].dropna()
        if len(known) > 1:
            winners = known.index[text.loc[known.index, column] == text.at[known.idxmax(), column]]
            best.loc[winners, column] = True
    return best


def rich_table(board: Board, tasks: bool = True) -> Table:
    """For the terminal; without the columns of the single tasks where that is too wide."""
    text, best = formatted(board), best_cells(board)
    text = text if tasks else text.drop(columns=board.tasks)
    table = Table(title=board.benchmark, caption="; ".join(board.notes) or None, caption_justify="left")
    table.add_column("method", no_wrap=True)
    for column in text.columns:
        table.add_column(HEADINGS.get(column, column), justify="right")
    for row in text.index:
        cells = [Text(text.at[row, c], style="bold" if best.at[row, c] else "") for c in text.columns]
        style = "" if board.table.at[row, "origin"] == MEASURED else "dim"
        table.add_row(Text(str(board.table.at[row, "method"])), *cells, style=style)
    return table


def markdown(board: Board, title: bool = True) -> str:
    """A Markdown table, the best in bold, and the notes."""
    text, best = formatted(board), best_cells(board)
    marked = text.where(~best, "**" + text + "**")
    marked.insert(0, "method", board.table["method"].astype(str))
    lines = [f"## {board.benchmark}", ""] if title else []
    lines += markdown_table(marked.rename(columns=HEADINGS))
    notes = [line for note in board.notes for line in ("", f"{note[0].upper()}{note[1:]}.")]
    return "\n".join([*lines, *notes, ""])


def markdown_table(text: pd.DataFrame) -> list[str]:
    """The lines of a table of strings; the first column is left-aligned, the others right."""
    rows = [list(text.columns), ["---", *["---:"] * (len(text.columns) - 1)], *text.to_numpy().tolist()]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def csv(all_boards: list[Board]) -> str:
    """All boards as one CSV file, with everything that is known, unrounded."""
    return pd.concat([b.table.assign(benchmark=b.benchmark) for b in all_boards]).to_csv(index=False)


def latex(board: Board) -> str:
    """A LaTeX table (booktabs), the best in bold."""
    text, best = formatted(board), best_cells(board)
    escaped = text.map(_escape)
    marked = escaped.where(~best, r"\textbf{" + escaped + "}")
    marked.insert(0, "method", board.table["method"].astype(str).map(_escape))
    marked.columns = [_escape(HEADINGS.get(column, column)) for column in marked.columns]
    styler = marked.style.hide(axis="index")
    return styler.to_latex(
        hrules=True, caption=_escape(board.benchmark), column_format="l" + "r" * (len(marked.columns) - 1)
    )


def _escape(text: str) -> str:
    return text.translate(ESCAPES)
