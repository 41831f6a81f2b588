"""Markdown tables, and text of unknown origin in Markdown."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .text import TEXT_LENGTH, printable

# an underscore between letters or digits is text; GitHub also links plain addresses
MARKUP = re.compile(r"[\\`*~$#<>&|]|\[|\]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.", re.IGNORECASE)
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", ":": "&#58;", ".": "&#46;"}


def markdown_table(frame: pd.DataFrame, digits: int | Mapping[str, int] = 1, index: bool = False) -> str:
    """A GitHub-flavoured Markdown table: the first column left-aligned, the others right-aligned.

    Args:
        frame: Numbers, and strings in Markdown (`escape_markdown` makes it of text); missing values become empty cells.
        digits: Decimals of the numbers, for all columns or by column (1 for columns that are not listed).
        index: Write the index as the first column.
    """
    decimals = digits if isinstance(digits, Mapping) else dict.fromkeys(frame.columns, digits)
    cells = {_escape(name): [_cell(value, decimals.get(name, 1)) for value in frame[name]] for name in frame.columns}
    text = pd.DataFrame(cells, index=frame.index)
    if index:
        text.insert(0, _escape(frame.index.name or ""), frame.index.map(_escape))
    alignment = ["left", *["right"] * (len(text.columns) - 1)]
    return str(text.to_markdown(index=False, colalign=alignment, disable_numparse=True))


def escape_markdown(value: object, limit: int = TEXT_LENGTH) -> str:
    """The text of a value in Markdown that shows the text itself, in one line: see `printable`."""
    return MARKUP.sub(lambda match: ENTITIES.get(match[0], f"\\{match[0]}"), printable(value, limit))


def _cell(value: Any, decimals: int) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.{decimals}f}" if isinstance(value, (int, float)) else _escape(value)


def _escape(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
