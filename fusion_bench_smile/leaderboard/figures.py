"""Boards as pictures: accuracy against parameters, heat maps over ranks, and the single tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .boards import Board, pareto

# colours that colour-blind readers can tell apart (Okabe and Ito), each with a marker of its own
STYLES = (
    ("#0072b2", "o"), ("#d55e00", "X"), ("#009e73", "^"), ("#e69f00", "D"), ("#cc79a7", "v"), ("#56b4e9", "s"),
    ("#7f7f7f", "P"), ("#000000", "*"), ("#999933", "h"), ("#882255", "<"), ("#44aa99", ">"),
)  # fmt: skip
TICKS = (1, 1.25, 1.5, 2, 4, 8, 16, 32)
BARS = 6


def family(method: str) -> str:
    """A method's name without its options."""
    return re.sub(r" \(.*\)", "", method)


def styles(boards: Sequence[Board]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family of measured methods: the same in all pictures of these boards."""
    families = sorted({family(name) for board in boards for name in board.measured["method"]}, key=_ours_first)
    return {name: STYLES[number % len(STYLES)] for number, name in enumerate(families)}


def gain_of(board: Board) -> str:
    """What the pictures show of a board: retention, or the average where the individual models aren't known."""
    return "retention" if board.measured["retention"].notna().any() else "average"


def scatter(boards: Sequence[Board]) -> Figure:
    """Retention (or the average) against the parameter ratio: a panel for each board, the Pareto front as a line."""
    of_family = styles(boards)
    size = (1.5 + 5 * len(boards), 5.2)
    figure, axes = plt.subplots(1, len(boards), figsize=size, squeeze=False, layout="constrained")
    for axis, board in zip(axes[0], boards, strict=True):
        _scatter_panel(axis, board, gain_of(board), of_family)
    labelled = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=min(4, 2 * len(boards)), frameon=False
    )
    return figure


def has_ratios(board: Board) -> bool:
    """Whether `scatter` has anything to show."""
    return bool(board.measured[["parameters", gain_of(board)]].notna().all(axis=1).any())


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG and SVG, and close it.

    Args:
        file: without ending.
    """
    for ending in ("png", "svg"):
        figure.savefig(file.with_name(f"{file.name}.{ending}"), dpi=150)
    plt.close(figure)


def rank_grid(board: Board, value: str = "average") -> pd.DataFrame:
    """The measured runs of SMILE over rank and gate_k: index ``k``, columns ``gate_k``; empty if it is no grid."""
    table = board.measured[board.measured["method"].map(family) == "SMILE"].dropna(subset=["gate_k", "k", value])
    grid = table.pivot_table(index="k", columns="gate_k", values=value, aggfunc="max")
    return grid if min(grid.shape) > 1 else grid.iloc[:0, :0]


def heat_maps(board: Board) -> Figure:
    """Average and parameter ratio of SMILE over rank and gate_k."""
    shown = {"average": "average score (%)", "parameters": "parameters, relative to the pretrained model"}
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 4.2), layout="constrained")
    for axis, (column, title) in zip(axes, shown.items(), strict=True):
        grid = rank_grid(board, column)
        image = axis.imshow(grid, origin="lower", aspect="auto", cmap="cividis")
        axis.set_xticks(range(len(grid.columns)), [f"{value:g}" for value in grid.columns])
        axis.set_yticks(range(len(grid.index)), [f"{value:g}" for value in grid.index])
        axis.set(xlabel="gate_k (rank of the router)", ylabel="k (rank of the experts)", title=title)
        middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
        for row, column_number in np.ndindex(grid.shape):
            number = grid.iat[row, column_number]
            if not np.isnan(number):
                text = f"{number:.2f}×" if column == "parameters" else f"{number:.1f}"
                axis.text(column_number, row, text, ha="center", va="center", color="w" if number < middle else "k")
        figure.colorbar(image, ax=axis)
    figure.suptitle(f"SMILE on {board.benchmark}")
    return figure


def task_bars(board: Board) -> Figure:
    """The score on each task of the individual models and the best methods, one of each family."""
    of_family = styles([board])
    measured = board.measured.sort_values("average", ascending=False)
    chosen = measured[~measured["method"].map(family).duplicated()].head(BARS)
    figure, axis = plt.subplots(figsize=(max(8, 1.5 * len(board.tasks)), 4.4), layout="constrained")
    scores = chosen.set_index("method")[board.tasks].T.astype(float)
    grouped_bars(axis, scores, [of_family[family(method)][0] for method in scores.columns])
    axis.set(ylabel="score (%)", title=board.benchmark)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def grouped_bars(axis: Axes, table: pd.DataFrame, colors: Sequence[str]) -> None:
    """One group of bars for each row of a table, one bar for each column."""
    width, places = 0.84 / len(table.columns), np.arange(len(table))
    for number, (column, color) in enumerate(zip(table.columns, colors, strict=False)):
        offset = (number - (len(table.columns) - 1) / 2) * width
        heights = table.iloc[:, number]
        axis.bar(places + offset, heights, width, label=column, color=color, edgecolor="w", linewidth=0.4)
    axis.set_xticks(places, table.index)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _scatter_panel(axis: Axes, board: Board, gain: str, of_family: dict[str, tuple[str, str]]) -> None:
    table = board.measured.dropna(subset=["parameters", gain])
    for name, rows in table.groupby(table["method"].map(family), sort=False):
        color, marker = of_family[name]
        axis.scatter(rows["parameters"], rows[gain], s=60, color=color, marker=marker, label=name, zorder=3, alpha=0.9)
    front = table[pareto(table, gain=gain)].sort_values("parameters")
    axis.plot(front["parameters"], front[gain], color="0.55", lw=1, ls="--", zorder=2, label="Pareto front")
    if gain == "retention":
        axis.axhline(100, color="0.8", linewidth=1, zorder=1)
    axis.set_xscale("log", base=2)
    low, high = table["parameters"].min(), table["parameters"].max()
    ticks = [tick for tick in TICKS if low * 0.9 <= tick <= high * 1.1]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="parameters, relative to the pretrained model", title=board.benchmark)
    axis.set_ylabel("retention (% of the individual models)" if gain == "retention" else "average score (%)")
    axis.grid(alpha=0.3)


def _ours_first(name: str) -> tuple[int, str]:
    order = ("SMILE", "SMILE of the framework", "individual", "pretrained")
    return (order.index(name) if name in order else len(order), name)
