"""Styles and helpers shared by the figures of leaderboards and studies."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..io import write_atomically
from ..io.text import printable

# colour and marker; the colours are distinguishable with colour vision deficiency (Okabe and Ito)
STYLES = (
    ("#0072b2", "o"), ("#d55e00", "X"), ("#009e73", "^"), ("#e69f00", "D"), ("#cc79a7", "v"), ("#56b4e9", "s"),
    ("#7f7f7f", "P"), ("#000000", "*"), ("#999933", "h"), ("#882255", "<"), ("#44aa99", ">"),
)  # fmt: skip
FORMATS = ("png", "svg")
LONGEST_SIDE = 100.0  # inches; matplotlib refuses images of more than 65,536 pixels
NAME_LENGTH = 60  # characters


def panels(width: float, height: float, *grid: int, **options: Any) -> tuple[Figure, Any]:
    """A figure of a size in inches, and its panel, or its array of panels; options are those of `Figure.subplots`.

    No side is longer than `LONGEST_SIDE`.
    """
    figure = Figure(figsize=(min(width, LONGEST_SIDE), min(height, LONGEST_SIDE)), layout="constrained")
    return figure, figure.subplots(*grid, **options)


def figure_text(value: object) -> str:
    """The text of a value as matplotlib draws it literally: one line, no formulas, and not left out of legends."""
    line = printable(value, NAME_LENGTH).replace("$", r"\$")
    return f" {line}" if not line or line.startswith("_") else line


def render_figure(figure: Figure) -> dict[str, bytes]:
    """The contents of an image file for each of `FORMATS`, at 150 dpi.

    Characters that the font lacks are drawn as boxes.
    """
    contents = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
        for suffix in FORMATS:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=150)
            contents[suffix] = buffer.getvalue()
    return contents


def save_figure(figure: Figure, file: Path) -> list[Path]:
    """Write a figure as PNG and SVG to a path without suffix, into an existing folder; the files are returned."""
    contents = {file.with_name(f"{file.name}.{suffix}"): image for suffix, image in render_figure(figure).items()}
    for path, image in contents.items():
        write_atomically(path, image)
    return list(contents)


def grouped_bars(axis: Axes, table: pd.DataFrame, colors: Sequence[str]) -> None:
    """Draw one group of bars for each row of a table, with one bar for each column in the colour of the column."""
    width, positions = 0.84 / len(table.columns), np.arange(len(table))
    for number, (column, color) in enumerate(zip(table.columns, colors, strict=False)):
        shifted = positions + (number - (len(table.columns) - 1) / 2) * width
        axis.bar(
            shifted, table.iloc[:, number], width, label=figure_text(column), color=color, edgecolor="w", linewidth=0.4
        )
    axis.set_xticks(positions, [figure_text(name) for name in table.index])
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def heatmap(axis: Axes, table: pd.DataFrame, template: str, bright: pd.DataFrame, **options: Any) -> AxesImage:
    """Draw a table as a heat map with its values in the cells.

    Args:
        template: Format of the values, e.g. ``{:.1f}``; cells of missing values are empty.
        bright: Whether the text of each cell is black instead of white.
        options: Options of `Axes.imshow`.
    """
    for row, column in zip(*np.nonzero(table.notna().to_numpy()), strict=True):
        color = "k" if bright.iat[row, column] else "w"
        axis.text(column, row, template.format(table.iat[row, column]), ha="center", va="center", color=color)
    return axis.imshow(table, aspect="auto", cmap="cividis", **options)
