"""Boards as one web page that needs no network: sort, filter, hover."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from .boards import COLUMNS, Board
from .figures import family, styles
from .gather import Skipped
from .tables import DIGITS, HEADINGS, UNITS, shown_columns

TEMPLATE = Path(__file__).with_name("page.html")
DETAILS = ("folder", "device", "top_k")


def page(boards: Sequence[Board], skipped: Sequence[Skipped] = (), title: str = "Leaderboard") -> str:
    """The page as HTML."""
    of_family = styles(boards)
    data = {
        "families": {name: {"color": color, "marker": marker} for name, (color, marker) in of_family.items()},
        "boards": [_board(board) for board in boards],
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    return template.render(
        title=title,
        # within <script> nothing but "<" could end the data
        data=jinja2.utils.markupsafe.Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        skipped=skipped,
    )


def _board(board: Board) -> dict[str, Any]:
    columns = [
        {
            "key": column,
            "heading": HEADINGS.get(column, column),
            "digits": DIGITS.get(column, 1),
            "unit": UNITS.get(column, ""),
            "help": COLUMNS.get(column, "score on this task, in %"),
        }
        for column in sorted(shown_columns(board), key=board.tasks.__contains__)  # on a phone the first ones are seen
    ]
    rows = [
        {
            "method": row["method"],
            "family": family(row["method"]),
            "origin": row["origin"],
            "kind": row["kind"],
            "values": {c["key"]: _plain(row[c["key"]]) for c in columns},
            "details": {name: _plain(row.get(name)) for name in DETAILS if _plain(row.get(name)) is not None},
        }
        for _, row in board.table.iterrows()
    ]
    return {"benchmark": board.benchmark, "notes": board.notes, "columns": columns, "rows": rows}


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value
