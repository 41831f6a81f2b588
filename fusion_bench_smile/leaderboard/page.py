"""Boards as one self-contained web page with sortable, filterable tables and interactive charts."""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from .boards import COLUMNS, Board
from .figures import family, family_styles
from .gather import Skipped
from .tables import DIGITS, HEADINGS, UNITS, shown_columns

TEMPLATE = Path(__file__).with_name("page.html")
DETAILS = ("folder", "device", "top_k")  # columns shown in the tooltip of a run


def page(boards: Sequence[Board], skipped: Sequence[Skipped] = (), title: str = "Leaderboard") -> str:
    """Boards and the list of skipped runs as HTML; the page loads nothing from the network."""
    styles = family_styles(boards).items()
    data = {
        "families": {name: {"color": color, "marker": marker} for name, (color, marker) in styles},
        "boards": [_board_data(board) for board in boards],
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    return template.render(
        title=title,
        # inside <script> only "<" could end the data
        data=jinja2.utils.markupsafe.Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        skipped=skipped,
    )


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
    return {"benchmark": board.benchmark, "notes": board.notes, "columns": columns, "rows": rows}
